"""Every named format reads a sample in its true layout, and says what it does to the rows."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mltfr_dist.cli import main
from mltfr_dist.config import PrepareConfig
from mltfr_dist.data.prepare.run import prepare
from mltfr_dist.data.sources.formats import FORMATS, GENERAL, NAMED
from mltfr_dist.data.sources.inputs import InputFile
from mltfr_dist.data.sources.layouts import layout, recognise
from mltfr_dist.data.sources.read import load_interactions
from mltfr_dist.errors import ConfigError, DataError

SAMPLES = Path(__file__).parents[2] / "samples"


def micros(text: str) -> int:
    """Microseconds since 1970 of an ISO date-time, by Python's own calendar."""
    return round(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1e6)


def plain(path: Path) -> InputFile:
    return InputFile(path, str(path), path.suffix.lower())


def load(*paths: Path, log: list[str] | None = None, **values: object) -> list[tuple]:
    """Rows (user, item, time), in file order."""
    said = [] if log is None else log
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        files = list(map(plain, paths))
        load_interactions(connection, files, PrepareConfig(**values), said.append)
        rows = connection.execute("SELECT * FROM interactions ORDER BY row_number").fetchall()
    return [(user, item, float(time)) for _, user, item, time in rows]


def refusal(*paths: Path, **values: object) -> str:
    with pytest.raises((DataError, ConfigError)) as caught:
        load(*paths, **values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


SESSIONS = {"user_column": "session_id"}
READ = {
    "movielens-1m.dat": [
        ("1", "1193", 978300760),
        ("1", "661", 978302109),
        ("2", "1193", 978298413),
    ],
    "movielens-20m.csv": [("1", "2", 1112486027), ("1", "29", 1112484676), ("2", "3", 974820889)],
    "movielens-100k.data": [
        ("196", "242", 881250949),
        ("186", "302", 891717742),
        ("196", "377", 878887116),
    ],
    "amazon-2014-ratings.csv": [
        ("A39HTATAQ9V7YF", "0205616461", 1369699200),
        ("A3JM6GV9MNOF9X", "0558925278", 1355443200),
        ("A39HTATAQ9V7YF", "0558925278", 1404691200),
    ],
    "amazon-2018-ratings.csv": [
        ("A1V6B6TNIC10QE", "0143026860", 1424304000),
        ("A2F5GHSXFQ0W6J", "0143026860", 1418860800),
        ("A1V6B6TNIC10QE", "014789302X", 1405209600),
    ],
    "amazon-2014-reviews.json": [
        ("A1YJEY40YUW4SE", "7806397051", 1391040000),
        ("A60XNB876KYML", "7806397051", 1397779200),
    ],
    "amazon-2023-ratings.csv": [
        ("AGKHLEW2SOWHNMFQIJGBECAF7INQ", "B00YQ6X8EO", 1588687728923),
        ("AGKHLEW2SOWHNMFQIJGBECAF7INQ", "B081TJ8YS3", 1588615855070),
        ("AE74DYR3QUGVPZJ3P7RFWBGIX7XQ", "B07PNNCSP9", 1589665266052),
    ],
    "amazon-2023-reviews.jsonl": [
        ("AGKHLEW2SOWHNMFQIJGBECAF7INQ", "B00YQ6X8EO", 1588687728923),
        ("AGKHLEW2SOWHNMFQIJGBECAF7INQ", "B081TJ8YS3", 1588615855070),
    ],
    "gowalla.txt": [
        ("0", "22847", micros("2010-10-19T23:55:27")),
        ("0", "420315", micros("2010-10-18T22:17:43")),
        ("1", "316637", micros("2010-10-17T23:42:03")),
    ],
    "foursquare.txt": [
        ("470", "49bbd6c0f964a520f4531fe3", micros("2012-04-03T18:00:09")),
        ("979", "4a43c0aef964a520c6a61fe3", micros("2012-04-03T18:00:25")),
    ],
    "lastfm-1k.tsv": [
        ("user_000001", "f1b1cf71-bd35-4e99-8624-24a6e15f133a", micros("2009-05-04T23:08:57")),
        ("user_000001", "a7f7df4a-77d8-4f12-8acd-5c60c93f4de8", micros("2009-05-04T13:54:10")),
    ],
    "retailrocket.csv": [
        ("257597", "355908", 1433221332117),
        ("992329", "248676", 1433224214164),
        ("599528", "356475", 1433222276276),
    ],
    "yoochoose.dat": [
        ("1", "214536502", micros("2014-04-07T10:51:09.277")),
        ("1", "214536500", micros("2014-04-07T10:54:09.868")),
        ("2", "214662742", micros("2014-04-07T13:56:37.614")),
    ],
    # histories first (the microseconds before the earliest impression), then clicks
    "mind.tsv": [
        ("U13740", "N55189", micros("2019-11-11T09:05:58") - 2),
        ("U13740", "N42782", micros("2019-11-11T09:05:58") - 1),
        ("U13740", "N55689", micros("2019-11-11T09:05:58")),
        ("U91836", "N39317", micros("2019-11-12T18:11:30")),
        ("U91836", "N58114", micros("2019-11-12T18:11:30")),
        ("U13740", "N35729", micros("2019-11-14T12:30:00")),
    ],
    "yelp.json": [
        ("mh_-eMZ6K5RLWhZyISBhwA", "XQfwVwDr-v0ZS3_CbbE5Xw", micros("2018-07-07T22:09:11")),
        ("OyoGAe7OKpv6SyGZT5g77Q", "7ATYjTIgM3jUlt4UM3IypQ", micros("2012-01-03T15:28:18")),
    ],
    "steam.json": [
        ("Chaos Syren", "725280", micros("2017-12-17")),
        ("Ariman's", "328100", micros("2017-08-02")),
    ],
    "kuairec.csv": [("14", "148", 1593898068.378), ("14", "3649", 1593898149.479)],
    "netflix.txt": [
        ("1488844", "1", micros("2005-09-06")),
        ("822109", "1", micros("2005-05-13")),
        ("1488844", "10", micros("2005-10-19")),
    ],
    "book-crossing.csv": [
        ("276725", "034545104X", 1),
        ("276726", "0155061224", 2),
        ("276725", "0446é;20802", 3),
    ],
    "pairs.txt": [("1", "1", 1), ("1", "2", 2), ("2", "1", 3), ("2", "3", 4), ("1", "4", 5)],
    "recbole.inter": [("196", "242", 881250949), ("186", "302", 891717742)],
    "recbole-sequences.inter": [
        ("1", "10", 1),
        ("1", "11", 2),
        ("1", "12", 3),
        ("1", "13", 4),
        ("2", "11", 1),
        ("2", "10", 2),
        ("2", "14", 3),
    ],
    "gru4rec.txt": [
        ("1", "214536502", 1396861869.277),
        ("1", "214536500", 1396862049.868),
        ("2", "214662742", 1396872997.614),
    ],
    "taobao.csv": [
        ("1", "2268318", 1511544070),
        ("1", "2333346", 1511561733),
        ("2", "4365585", 1511544071),
    ],
}


def test_every_named_format_has_a_sample():
    assert {Path(name).stem for name in READ} | {"parquet-lists"} == set(NAMED)
    assert {path.name for path in SAMPLES.iterdir()} == set(READ)


@pytest.mark.parametrize("name", READ)
def test_sample_is_read_and_recognised(name):
    format = Path(name).stem
    options = SESSIONS if format == "recbole-sequences" else {}
    log: list[str] = []
    assert load(SAMPLES / name, log=log, format=format, **options) == READ[name]
    assert recognise(plain(SAMPLES / name)) == format
    for note in NAMED[format].notes:
        assert f"{format}: {note}" in log
    if NAMED[format].time is None:
        assert any("No time is read" in line for line in log)


@pytest.mark.parametrize("name", READ)
def test_what_a_sample_is_refused_for_names_its_format(name):
    """Read as a general format, a sample is refused (its own is named), or read rightly."""
    format = Path(name).stem
    for general in ("auto", "csv", "tsv", "jsonl", "sequences"):
        try:
            rows = load(SAMPLES / name, format=general)
        except DataError as error:
            assert f"--format {format}" in str(error), (general, str(error))  # noqa: PT017
        else:
            assert [row[:2] for row in rows] == [row[:2] for row in READ[name]], general


def test_rows_left_out_are_counted():
    log: list[str] = []
    load(SAMPLES / "kuairec.csv", log=log, format="kuairec")
    assert any("1 of 3 rows" in line for line in log)
    message = refusal(SAMPLES / "kuairec.csv", format="kuairec", missing="refuse")
    assert "line 3: `timestamp` is empty" in message
    assert "--missing drop" in message
    assert [
        row[1] for row in load(SAMPLES / "lastfm-1k.tsv", format="lastfm-1k", item_column="4")
    ] == [
        "Deep Dish",
        "坂本龍一",
        "Unknown",
    ]


def test_another_named_format_is_refused():
    message = refusal(SAMPLES / "amazon-2018-ratings.csv", format="amazon-2014-ratings")
    assert "does not look like amazon-2014-ratings" in message
    assert "--format amazon-2018-ratings" in message


def test_list_columns(tmp_path):
    path = tmp_path / "lists.parquet"
    times = pa.array([[1500000000, 1500000001], [1500000002]], pa.list_(pa.timestamp("s")))
    table = pa.table({"user_id": ["u", "v"], "item_id": [[7, 8], [9]], "timestamp": times})
    pq.write_table(table, path)
    rows = [("u", "7", 1.5e15), ("u", "8", 1.5e15 + 1e6), ("v", "9", 1.5e15 + 2e6)]
    assert load(path, format="parquet-lists") == rows
    assert [row[2] for row in load(path, format="parquet-lists", order="file")] == [1, 2, 1]
    assert "--format parquet-lists" in refusal(path)
    pq.write_table(table.set_column(2, "timestamp", pa.array([[1], [2]])), path)
    assert "row 1: `item_id` and `timestamp` are of unequal length" in refusal(
        path, format="parquet-lists"
    )
    pq.write_table(table.set_column(0, "user_id", pa.array(["u", "u"])), path)
    assert "row 2: the user `u` was on row 1 already" in refusal(
        path, format="parquet-lists", order="file"
    )
    other = tmp_path / "other.parquet"
    pq.write_table(table, path)
    pq.write_table(table.set_column(0, "user_id", pa.array(["w", "u"])), other)
    message = refusal(path, other, format="parquet-lists", order="file")
    assert "other.parquet, row 2: the user `u` was in a file before" in message
    wrong = table.set_column(1, "item_id", pa.array([[1.0], [2.0]], pa.list_(pa.float32())))
    pq.write_table(wrong, path)
    assert "of type FLOAT[]" in refusal(path, format="parquet-lists")
    assert "no column `items`" in refusal(path, format="parquet-lists", item_column="items")


def test_recbole_sequences_with_several_rows_a_user(tmp_path):
    path = tmp_path / "x.inter"
    header = "user_id:token\titem_id_list:token_seq\titem_id:token\n"
    path.write_text(header + "1\t10\t11\n1\t10 11\t12\n")
    message = refusal(path, format="recbole-sequences")
    assert "row 2: the user `1` was on row 1 already" in message
    assert "keep the longest" in message


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("netflix", "1,3,2005-01-01\n", ["line 1", "not `movie:`"]),
        ("netflix", "1:\n1,3\n", ["line 2"]),
        ("steam", "{'username': 'a'}\n[1]\n", ["line 2", "not a Python dict"]),
        ("steam", "{'username': open('x')}\n", ["line 1", "not a Python dict"]),
        (
            "steam",
            "{'username': True, 'product_id': 1, 'date': '2017-01-01'}\n",
            ["line 1", "True"],
        ),
        ("steam", "{'username': 'a', 'product_id': 1}\n", ["line 1", "`date` is empty"]),
        ("mind", "1\tU1\tsoon\t\tN1-1\n", ["line 1", "`soon`"]),
        ("mind", "1\tU1\t11/11/2019 9:05:58 AM\t\tN1-2\n", ["line 1", "`N1-2`"]),
        ("mind", "1\tU1\t11/11/2019 9:05:58 AM\tN1-1\n", ["line 1"]),
        ("pairs", "1 2\n1 2 3\n", ["line 2", "3 fields", "--format sequences"]),
    ],
)
def test_lines_that_are_not_of_the_format(tmp_path, name, content, words):
    path = tmp_path / "file.txt"
    path.write_text(content)
    message = refusal(path, format=name)
    for word in [str(path), *words]:
        assert word in message


def test_format_help_and_unknown_names(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["prepare", "--format", "help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for name, format in FORMATS.items():
        assert name in printed
        assert format.title in printed
    message = refusal(SAMPLES / "netflix.txt", format="netflicks")
    assert "no format `netflicks`; the nearest is `netflix`" in message


@pytest.mark.parametrize(
    ("format", "options", "words"),
    [
        ("movielens-1m", {"delimiter": ","}, "--delimiter"),
        ("parquet", {"header": False}, "--no-header"),
        ("jsonl", {"skip_rows": 1}, "--skip-rows"),
        ("sequences", {"user_column": "1"}, "--user-column"),
        ("sequences", {"time_format": "%Y"}, "--time-format"),
        ("gowalla", {"time_format": "%Y"}, "--time-format"),
        ("csv", {"order": "file", "time_column": "t"}, "--time-column"),
        ("csv", {"delimiter": "::", "quote": "'"}, "--quote"),
        ("book-crossing", {"time_column": "t"}, "--time-column"),
    ],
)
def test_options_that_a_format_has_no_use_for(format, options, words):
    with pytest.raises(ConfigError) as caught:
        layout(format, PrepareConfig(**options))
    assert words in str(caught.value)


def test_general_options_override_columns_of_named_formats():
    assert layout("retailrocket", PrepareConfig(item_column="event")).item == "event"
    assert layout("csv", PrepareConfig(delimiter="::")).quote == ""
    assert layout("csv", PrepareConfig(delimiter=r"\t")).delimiter == "\t"
    assert set(GENERAL) & set(NAMED) == set()


def test_formats_without_time_cannot_be_cut_by_time(tmp_path):
    config = PrepareConfig(format="pairs", split="global_temporal")
    with pytest.raises(DataError, match="has no time"):
        prepare(str(SAMPLES / "pairs.txt"), tmp_path / "out", config, log=lambda _: None)
    assert not (tmp_path / "out").exists()


def test_pairs_are_prepared_in_file_order(tmp_path):
    path = tmp_path / "pairs.txt"
    path.write_text(
        "".join(f"{user} {user * item % 7}\n" for item in range(1, 7) for user in (1, 2, 3))
    )
    config = PrepareConfig(format="pairs", user_core=1, item_core=1)
    manifest = prepare(str(path), tmp_path / "out", config, log=lambda _: None)
    assert manifest.num_interactions == 18
    assert manifest.report.times is None
    assert manifest.report.ties == 0
