"""How files are laid out: general formats, and those of public sets; each is one entry here.

`mltfr prepare --format help` lists them; docs/data.md has a command for each; a sample of each
named one lies in tests/samples/.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Reader = Literal["delimited", "parquet", "jsonl", "lists", "lines"]


@dataclass(frozen=True)
class Format:
    """One layout of files.

    Attributes:
        title: what it is, in one line.
        reader: which module reads it.
        user, item, time: columns: names, or numbers from 1 where there is no header. No time: rows
            are in order already.
        header: the first line names the columns.
        delimiter, quote, encoding, skip_rows: of delimited text.
        time_format: strptime's pattern; None: numbers, or dates that begin with the year.
        missing: what becomes of rows without a user, an item or a time.
        looks: regular expression that each of the first lines matches; with a header, the first.
        notes: what reading does to the rows beyond taking three columns, for the log.
    """

    title: str
    reader: Reader
    user: str = "user_id"
    item: str = "item_id"
    time: str | None = "timestamp"
    header: bool = True
    delimiter: str = ","
    quote: str = '"'
    encoding: Literal["utf-8", "latin-1"] = "utf-8"
    skip_rows: int = 0
    time_format: str | None = None
    missing: Literal["refuse", "drop"] = "refuse"
    null: tuple[str, ...] = ()
    looks: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        """User, item and, where there is one, time."""
        return [self.user, self.item, *([self.time] if self.time is not None else [])]


_RATINGS = "Ratings are not read: every row counts as an interaction."
_ISO = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z"
_MS = "Times are in milliseconds."


def _tabbed(title: str, **values: object) -> Format:
    """Tab separated text; it has no quoting: a title may begin with a quotation mark."""
    return Format(title, "delimited", delimiter="\t", quote="", **values)  # type: ignore[arg-type]


GENERAL = {
    "csv": Format("comma separated, a line of column names", "delimited"),
    "tsv": _tabbed("tab separated, a line of column names, no quoting"),
    "parquet": Format("Parquet, one row an interaction", "parquet"),
    "jsonl": Format("a JSON object a line", "jsonl"),
    "sequences": Format(
        "`user item item ...` a line, oldest first", "lists", user="user", item="item", time=None
    ),
}
NAMED = {
    "pairs": Format(
        "`user item` a line, in order of time (SASRec's files)",
        "lists",
        user="user",
        item="item",
        time=None,
        looks=r"[^\s,;:]+[ \t]+[^\s,;:]+",
    ),
    "parquet-lists": Format(
        "Parquet, one row a user, with a list of items (and one of times, or --order file)",
        "parquet",
    ),
    "recbole": _tabbed(
        "RecBole's atomic .inter: tab separated, columns `name:type`",
        looks=r"[^\t]+:(token|float)(\t[^\t]+:(token|float))*",
    ),
    "recbole-sequences": _tabbed(
        "RecBole's .inter with `item_id_list:token_seq`, one row a user",
        item="item_id_list",
        time=None,
        looks=r".*:token_seq(\t.*)?",
        notes=("The column `item_id`, where there is one, is the last item of its row.",),
    ),
    "gru4rec": _tabbed(
        "GRU4Rec's session files: SessionId, ItemId, Time",
        user="SessionId",
        item="ItemId",
        time="Time",
        looks=r"SessionId\tItemId\tTime(\t.*)?",
        notes=("Each session is a user.",),
    ),
    "movielens-1m": Format(
        "MovieLens-1M and -10M ratings.dat: `user::item::rating::time`",
        "delimited",
        user="1",
        item="2",
        time="4",
        header=False,
        delimiter="::",
        quote="",
        looks=r"\d+::\d+::[\d.]+::\d+",
        notes=(_RATINGS,),
    ),
    "movielens-20m": Format(
        "MovieLens-20M, -25M and latest ratings.csv",
        "delimited",
        user="userId",
        item="movieId",
        looks="userId,movieId,rating,timestamp",
        notes=(_RATINGS,),
    ),
    "movielens-100k": _tabbed(
        "MovieLens-100K u.data: user, item, rating, time",
        user="1",
        item="2",
        time="4",
        header=False,
        looks=r"\d+\t\d+\t[1-5]\t\d{9}",
        notes=(_RATINGS,),
    ),
    "amazon-2014-ratings": Format(
        "Amazon 2014 ratings_*.csv: user, item, rating, time, no header",
        "delimited",
        user="1",
        item="2",
        time="4",
        header=False,
        looks=r"[A-Z0-9#][\w#-]{10,},[A-Z0-9]{10},[1-5](\.0)?,\d{9,10}",
        notes=(_RATINGS,),
    ),
    "amazon-2018-ratings": Format(
        "Amazon 2018 ratings: item, user, rating, time, no header",
        "delimited",
        user="2",
        item="1",
        time="4",
        header=False,
        looks=r"[A-Z0-9]{10},[A-Z0-9#][\w#-]{10,},[1-5](\.0)?,\d{9,10}",
        notes=(_RATINGS,),
    ),
    "amazon-2014-reviews": Format(
        "Amazon 2014 and 2018 reviews_*.json: a JSON object a line",
        "jsonl",
        user="reviewerID",
        item="asin",
        time="unixReviewTime",
        looks=r'\{(?=.*"reviewerID")(?=.*"asin")(?=.*"unixReviewTime").*',
        notes=(_RATINGS,),
    ),
    "amazon-2023-ratings": Format(
        "Amazon 2023 ratings and 0-core/5-core csv",
        "delimited",
        item="parent_asin",
        looks=r"user_id,parent_asin,rating,timestamp(,.*)?",
        notes=(_RATINGS, _MS),
    ),
    "amazon-2023-reviews": Format(
        "Amazon 2023 reviews jsonl",
        "jsonl",
        item="parent_asin",
        looks=r'\{(?=.*"parent_asin")(?=.*"user_id")(?=.*"timestamp").*',
        notes=("Items are parent_asin (variants of one product are one item).", _RATINGS, _MS),
    ),
    "book-crossing": Format(
        "Book-Crossing BX-Book-Ratings.csv: `;`, quoted, latin-1, no time",
        "delimited",
        user="User-ID",
        item="ISBN",
        time=None,
        delimiter=";",
        encoding="latin-1",
        looks='"?User-ID"?;"?ISBN"?;"?(Book-)?Rating"?',
        notes=(_RATINGS,),
    ),
    "foursquare": _tabbed(
        "Foursquare dataset_TSMC2014_*.txt: user, venue, ..., UTC time",
        user="1",
        item="2",
        time="8",
        header=False,
        encoding="latin-1",
        time_format="%a %b %d %H:%M:%S %z %Y",
        looks=r"\d+\t\w+\t.*\t\w{3} \w{3} \d\d [\d:]{8} \+0000 \d{4}",
    ),
    "gowalla": _tabbed(
        "Gowalla (and Brightkite) totalCheckins.txt: user, time, latitude, longitude, place",
        user="1",
        item="5",
        time="2",
        header=False,
        looks=rf"\d+\t{_ISO}\t-?[\d.]+\t-?[\d.]+\t\w+",
    ),
    "kuairec": Format(
        "KuaiRec small_matrix.csv and big_matrix.csv",
        "delimited",
        item="video_id",
        missing="drop",
        looks="user_id,video_id,play_duration,video_duration,time,date,timestamp,watch_ratio",
        notes=("Every view counts, however short; rows with an empty time are left out.",),
    ),
    "lastfm-1k": _tabbed(
        "LastFM-1K userid-timestamp-artid-artname-traid-traname.tsv",
        user="1",
        item="3",
        time="2",
        header=False,
        missing="drop",
        looks=rf"user_\d{{6}}\t{_ISO}\t.*",
        notes=("Items are artists, but for those without an id. Tracks: --item-column 5.",),
    ),
    "mind": Format(
        "MIND behaviors.tsv: clicked impressions, behind the history",
        "lines",
        looks=r"\d+\tU\d+\t\d+/\d+/\d{4} \d+:\d+:\d+ [AP]M\t.*",
        notes=(
            "Impressions that were not clicked are not read.",
            "A user's history (of the first impression) counts as earlier than every impression.",
        ),
    ),
    "netflix": Format(
        "Netflix combined_data_*.txt: `movie:`, then lines `user,rating,date`",
        "lines",
        looks=r"\d+:|\d+,[1-5],\d{4}-\d\d-\d\d",
        notes=(_RATINGS, "Ratings of one day keep the file's order, which is by movie."),
    ),
    "retailrocket": Format(
        "RetailRocket events.csv",
        "delimited",
        user="visitorid",
        item="itemid",
        looks="timestamp,visitorid,event,itemid,transactionid",
        notes=("Views, additions to the cart and transactions all count.", _MS),
    ),
    "steam": Format(
        "Steam steam_reviews.json: a Python dict a line",
        "lines",
        user="username",
        item="product_id",
        time="date",
        looks=r"\{(?=.*u?'username': )(?=.*u?'product_id': ).*\}",
        notes=("Reviews of one day keep the file's order.",),
    ),
    "taobao": Format(
        "Taobao UserBehavior.csv: user, item, category, behaviour, time, no header",
        "delimited",
        user="1",
        item="2",
        time="5",
        header=False,
        looks=r"\d+,\d+,\d+,(pv|buy|cart|fav),-?\d+",
        notes=("Views, carts, favourites and purchases all count.",),
    ),
    "yelp": Format(
        "Yelp yelp_academic_dataset_review.json: a JSON object a line",
        "jsonl",
        item="business_id",
        time="date",
        looks=r'\{(?=.*"review_id")(?=.*"user_id")(?=.*"business_id")(?=.*"date").*',
        notes=(_RATINGS,),
    ),
    "yoochoose": Format(
        "Yoochoose clicks.dat (and buys.dat): session, time, item, ..., no header",
        "delimited",
        user="1",
        item="3",
        time="2",
        header=False,
        looks=rf"\d+,{_ISO},\d+,.+",
        notes=("Each session is a user.",),
    ),
}
FORMATS = GENERAL | NAMED

ENDINGS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".inter": "tsv",  # RecBole's atomic files: tab separated, columns named `name:type`
    ".item": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "sequences",
}
