"""Public sets by name: where their owners offer them, under which terms, and how to read them.

A checksum is there where it was published, or could be computed from a copy of known origin. Where
there is none, the first fetch records one, and later fetches are compared with that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

SETS = Path("data/sets")
"""Folder that sets are fetched into, unless another is named."""


@dataclass(frozen=True)
class PublicSet:
    """A set that can be fetched."""

    about: str
    url: str
    """Begins with https; empty: its owners offer it in a way that a program cannot use."""
    terms: str
    """Licence or terms of use, shown before anything is fetched."""
    checksum: str = ""
    """`sha256:HEX` or `md5:HEX` of the file at ``url``; empty: not known."""
    member: str = ""
    """The file of interactions in the archive at ``url``; empty: the file itself."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Fields of :class:`PrepareConfig` that fit the set, under what the user gives."""

    @property
    def file(self) -> str:
        """Name of the file at ``url``."""
        return self.url.rpartition("/")[2]


_S3REC = "https://raw.githubusercontent.com/RUCAIBox/CIKM2020-S3Rec/master/data"
_GROUPLENS = "https://files.grouplens.org/datasets/movielens"
_AMAZON_2014 = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"
_AMAZON_2023 = (
    "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/benchmark/5core/rating_only"
)
_S3REC_TERMS = (
    "Research data of RUCAIBox/CIKM2020-S3Rec on GitHub, without a licence file: use it for "
    "research, do not redistribute it, cite its source (S3-Rec, CIKM 2020)."
)
_GROUPLENS_TERMS = (
    "GroupLens' terms: for research, not for sale, not to be redistributed without permission; "
    "cite Harper and Konstan 2015. See https://grouplens.org/datasets/movielens/."
)
_AMAZON_TERMS = (
    "No licence is stated; offered for research by J. McAuley's group at UC San Diego. Reviews are "
    "their authors'. Cite the papers that {} names."
)
_AMAZON_2014_TERMS = _AMAZON_TERMS.format("https://jmcauley.ucsd.edu/data/amazon/")
_AMAZON_2023_TERMS = _AMAZON_TERMS.format("https://amazon-reviews-2023.github.io/")
_SEQUENCES = {"format": "sequences"}


def _s3rec(name: str, about: str, sha256: str) -> PublicSet:
    checksum = f"sha256:{sha256}" if sha256 else ""
    return PublicSet(
        about, f"{_S3REC}/{name}.txt", _S3REC_TERMS, checksum, options=dict(_SEQUENCES)
    )


def _movielens(name: str, about: str, checksum: str, member: str, format: str) -> PublicSet:
    url = f"{_GROUPLENS}/{name}.zip"
    return PublicSet(about, url, _GROUPLENS_TERMS, checksum, f"{name}/{member}", {"format": format})


def _amazon_2014(category: str, sha256: str) -> PublicSet:
    return PublicSet(
        f"Amazon 2014, ratings of {category}: every rating, no core",
        f"{_AMAZON_2014}/ratings_{category}.csv",
        _AMAZON_2014_TERMS,
        f"sha256:{sha256}",
        options={"format": "amazon-2014-ratings"},
    )


def _amazon_2023(category: str, sha256: str = "") -> PublicSet:
    return PublicSet(
        f"Amazon 2023, 5-core ratings of {category}",
        f"{_AMAZON_2023}/{category}.csv.gz",
        _AMAZON_2023_TERMS,
        f"sha256:{sha256}" if sha256 else "",
        options={"format": "amazon-2023-ratings"},
    )


PUBLIC_SETS = {
    "beauty": _s3rec(
        "Beauty",
        "Amazon Beauty 2014, 5-core, as sequences (S3-Rec): the set of presets beauty, *_beauty",
        "226cce9c3105299ca0db9615d7d3fb32b3175e90da43100ae352599f0f0107b8",
    ),
    "toys": _s3rec(
        "Toys_and_Games",
        "Amazon Toys and Games 2014, 5-core, as sequences (S3-Rec): the set of the preset toys",
        "176c680c688d497598c4a89a03b402c0fe78d795e5db335c2e78dd5f2d778a3f",
    ),
    "sports": _s3rec(
        "Sports_and_Outdoors", "Amazon Sports 2014, 5-core, as sequences (S3-Rec)", ""
    ),
    "lastfm": _s3rec(
        "LastFM",
        "Last.fm, artists, as sequences (S3-Rec)",
        "9ded486adb5b0fe9dc761950afa0a9a05e93ff018992e0c52bf11afec529f802",
    ),
    "pantry": PublicSet(
        "Amazon Pantry as sequences, of the authors of MLTFR: the set of the preset paper",
        "",
        "Research data without a licence file, in the repository https://github.com/ccwwhhh/MLTFR: "
        "take Pantry.txt from there.",
        "sha256:3b490203b2aa34f9440a499468c54e7fb45b640363a4a17d6327e0c63b39acb9",
        options={**_SEQUENCES, "user_core": 1, "item_core": 1},
    ),
    "ml-100k": _movielens(
        "ml-100k",
        "MovieLens-100K: without --download, the example files of the PyPI package recbole",
        "md5:0e33842e24a9c977be4e0107933c0723",
        "u.data",
        "movielens-100k",
    ),
    "ml-1m": _movielens(
        "ml-1m",
        "MovieLens-1M",
        "sha256:a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
        "ratings.dat",
        "movielens-1m",
    ),
    "ml-20m": _movielens(
        "ml-20m",
        "MovieLens-20M",
        "md5:cd245b17a1ae2cc31bb14903e1204af3",
        "ratings.csv",
        "movielens-20m",
    ),
    "ml-25m": _movielens(
        "ml-25m",
        "MovieLens-25M",
        "md5:6b51fb2759a8657d3bfcbfc42b592ada",
        "ratings.csv",
        "movielens-20m",
    ),
    "amazon-2014-beauty": _amazon_2014(
        "Beauty", "17d5232b90444beecfe758ce1446e5300230491f3a88ac802992ca95fc4c150f"
    ),
    "amazon-2014-toys": _amazon_2014(
        "Toys_and_Games", "e28a342ca89a79036a9a840c0385a3a3342a08d3d3450ea3eaf3d544cd65d3af"
    ),
    "amazon-2014-games": _amazon_2014(
        "Video_Games", "f0ca171050c2e0f208d47f5267992476b21ab68a01439c21c8be1a4432982cfa"
    ),
    "amazon-2014-books": _amazon_2014(
        "Books", "87d923ddac2aacf40c1d0e0e056dbf4bf69c9c7d41852c6b434e781e759c0707"
    ),
    "amazon-2023-beauty": _amazon_2023("Beauty_and_Personal_Care"),
    "amazon-2023-games": _amazon_2023(
        "Video_Games", "a2bde5f3b945960d161538c200dd87845e6ee471b46da96410dde61613c6901c"
    ),
    "amazon-2023-books": _amazon_2023("Books"),
    "gowalla": PublicSet(
        "Gowalla check-ins (SNAP)",
        "https://snap.stanford.edu/data/loc-gowalla_totalCheckins.txt.gz",
        "No licence is stated; offered for research by SNAP. Cite Cho, Myers and Leskovec 2011.",
        options={"format": "gowalla"},
    ),
    "yoochoose": PublicSet(
        "YooChoose clicks of the RecSys Challenge 2015",
        "",
        "CC BY-NC-ND 4.0; a .7z archive at https://s3-eu-west-1.amazonaws.com/yc-rdata/"
        "yoochoose-data.7z: unpack it, and prepare yoochoose-clicks.dat.",
        options={"format": "yoochoose"},
    ),
}
"""Each set by the name that `mltfr fetch` takes."""
