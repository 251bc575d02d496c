"""Reading of every format, and the message of every bad input."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mltfr_dist.config import PrepareConfig
from mltfr_dist.data.sources.inputs import InputFile
from mltfr_dist.data.sources.read import detect_format, load_interactions, load_titles, named_source
from mltfr_dist.errors import DataError

ROWS = [(1, "u1", "a", Decimal(10)), (2, "u2", "b", Decimal(11)), (3, "u1", "b", Decimal("12.5"))]
CSV = "user_id,item_id,timestamp\nu1,a,10\nu2,b,11\nu1,b,12.5\n"
JSONL = (
    '{"user_id": "u1", "item_id": "a", "timestamp": 10}\n'
    '{"item_id": "b", "user_id": "u2", "timestamp": 11, "more": [1]}\n'
    '{"user_id": "u1", "item_id": "b", "timestamp": "12.5"}\n'
)


def put(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def plain(path: Path) -> InputFile:
    return InputFile(path, str(path), path.suffix.lower())


def load(path: Path, **values: object) -> list[tuple]:
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        count = load_interactions(connection, [plain(path)], PrepareConfig(**values))
        rows = connection.execute("SELECT * FROM interactions ORDER BY row_number").fetchall()
    assert count == len(rows)
    return rows


def refusal(path: Path, **values: object) -> str:
    with pytest.raises(DataError) as caught:
        load(path, **values)
    assert caught.value.remedy
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("r.csv", CSV),
        ("bom.csv", "\ufeff" + CSV),
        ("crlf.csv", CSV.replace("\n", "\r\n")),
        ("odd [1]*?'.csv", CSV),
        (
            "quoted.csv",
            'timestamp,"user_id",x,item_id\n10,"u1","a, b\nc",a\n\n11,u2,,b\n12.5,u1,,b\n',
        ),
        ("r.tsv", CSV.replace(",", "\t")),
        (
            "r.inter",
            "user_id:token\titem_id:token\ttimestamp:float\nu1\ta\t10\nu2\tb\t11\nu1\tb\t12.5\n",
        ),
        ("r.jsonl", JSONL),
        ("blank.ndjson", "\n" + JSONL),
    ],
)
def test_text_formats_give_the_same_rows(tmp_path, name, text):
    rows = load(put(tmp_path / name, text))
    assert [row[1:] for row in rows] == [row[1:] for row in ROWS]


def test_parquet_of_any_types(tmp_path):
    table = pa.table(
        {
            "user_id": [1, 2],
            "item_id": ["x", "y"],
            "timestamp": pa.array([0, 1_500_000], pa.timestamp("us")),
        }
    )
    pq.write_table(table, tmp_path / "r.parquet")
    assert load(tmp_path / "r.parquet", times="any") == [
        (1, 1, "x", Decimal(0)),
        (2, 2, "y", Decimal(1_500_000)),
    ]


def test_other_column_names_with_quotes(tmp_path):
    path = put(tmp_path / "r.csv", '"us""er",it\'em,t\nu,i,1\n')
    assert load(path, user_column='us"er', item_column="it'em", time_column="t") == [
        (1, "u", "i", Decimal(1))
    ]
    pq.write_table(pa.table({'us"er': ["u"], "it'em": ["i"], "t": [1]}), tmp_path / "r.parquet")
    assert load(
        tmp_path / "r.parquet", user_column='us"er', item_column="it'em", time_column="t"
    ) == [(1, "u", "i", Decimal(1))]
    path = put(tmp_path / "r.jsonl", '{"u/~": "u", "it\'em": "i", "t": 1}')
    assert load(path, user_column="u/~", item_column="it'em", time_column="t") == [
        (1, "u", "i", Decimal(1))
    ]


def test_sequence_text_takes_positions_as_time(tmp_path):
    rows = load(put(tmp_path / "s.txt", "u1 a b a\n\n u2\tb  a \n"))
    assert [row[1:] for row in rows] == [
        ("u1", "a", Decimal(1)),
        ("u1", "b", Decimal(2)),
        ("u1", "a", Decimal(3)),
        ("u2", "b", Decimal(1)),
        ("u2", "a", Decimal(2)),
    ]
    assert [row[0] for row in rows] == [1, 2, 3, 4, 5]


def test_dates_are_microseconds_in_utc(tmp_path):
    times = (
        "1970-01-01",
        "1970-01-01T00:00:01",
        "1970-01-01 00:00:02.5Z",
        "1970-01-01 02:00:00+01:00",
    )
    text = "user_id,item_id,timestamp\n" + "".join(f"u,a,{time}\n" for time in times)
    assert [int(row[3]) for row in load(put(tmp_path / "d.csv", text), times="any")] == [
        0,
        1_000_000,
        2_500_000,
        3_600_000_000,
    ]


def test_large_file_keeps_file_order(tmp_path):
    count = 300_000
    path = put(
        tmp_path / "r.csv",
        "user_id,item_id,timestamp\n" + "".join(f"u,{index},0\n" for index in range(1, count + 1)),
    )
    assert all(row[0] == int(row[2]) for row in load(path))


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("r.csv", CSV + "u1,c\n", ["line 5", "`u1,c`", "3 Found: 2"]),
        ("r.csv", CSV.replace("u2,b,11", "\nu2,b,11,7"), ["line 4", "`u2,b,11,7`", "3 Found: 4"]),
        ("r.csv", CSV + 'u1,"c,3\n', ["line 5", "quote"]),
        (
            "r.csv",
            CSV + "u1,c,soon\n",
            ["line 5", "`soon`", "`timestamp`", "not a number, as in the first row"],
        ),
        ("r.csv", CSV.replace("11", "nan"), ["line 3", "`nan`"]),
        ("r.csv", "user_id,item_id,timestamp\nu,a,\n", ["line 2", "`timestamp` is empty"]),
        (
            "r.csv",
            'user_id,item_id,timestamp\n\n"u\nv",a,1\n,a,2\n',
            ["line 5", "`user_id` is empty"],
        ),
        (
            "r.csv",
            "user_id,item_id,timestamp\nu,a,soon\n",
            ["line 2", "`soon`", "not a number, date or date-time"],
        ),
        (
            "r.csv",
            "user_id,item_id,timestamp\nu,a,2020-01-01\nu,a,7\n",
            ["line 3", "`7`", "not a date"],
        ),
        ("r.csv", "user_id,item_id,timestamp\n", ["no rows"]),
        ("r.csv", "", ["no rows"]),
        (
            "r.csv",
            "user_id,itemid,timestamp\nu,a,1\n",
            ["no column `item_id`", "`user_id`, `itemid`, `timestamp`", "nearest is `itemid`"],
        ),
        ("r.tsv", "user_id\titem_id\ttimestamp\nu\t\t1\n", ["line 2", "`item_id` is empty"]),
        ("r.jsonl", JSONL + "{oops}\n", ["line 4", "`{oops}` is no JSON object"]),
        ("r.jsonl", JSONL + "[1]\n", ["line 4", "`[1]` is no JSON object"]),
        (
            "r.jsonl",
            "\n" + JSONL + '{"user_id": "u", "item_id": null, "timestamp": 1}\n',
            ["line 5", "`item_id` is empty"],
        ),
        (
            "r.jsonl",
            '{"user": 1, "item_id": 2, "timestamp": 3}\n',
            ["no column `user_id`", "nearest is `user`"],
        ),
        ("r.jsonl", "\n", ["no rows"]),
        ("s.txt", "u1 a b\nu2\n", ["line 2", "`u2` stands alone"]),
        ("s.txt", "u1 a b\n\nu2 a\nu1 c\n", ["line 4", "`u1` was on line 1 already"]),
        ("s.txt", "", ["no rows"]),
        ("r.csv", CSV + "NaN,c,3\n", ["line 5", "`user_id` is NaN"]),
        (
            "r.csv",
            CSV + "u1,1.23457E+19,3\n",
            ["line 5", "`item_id` is a rounded number", "different ids merge"],
        ),
        (
            "r.jsonl",
            '\n{"user_id": 1e300, "item_id": 1, "timestamp": 1}\n',
            ["line 2", "`user_id` is a rounded number"],
        ),
        ("r.csv", CSV + '"u\t1",c,3\n', ["line 5", "`user_id` holds a tab"]),
        (
            "r.csv",
            "user_id,item_id,timestamp\n7,a,1\n7.0,a,2\n",
            ["line 3", "mixed types", "line 2", "7.0"],
        ),
        (
            "r.csv",
            CSV.replace(",10\n", ",1700000000\n").replace(",11\n", ",1700000000000\n"),
            ["line 3", "in milliseconds"],
        ),
        (
            "r.csv",
            CSV + "u1,c,4000000000\n",
            ["line 5", "2096-10-02", "in the future", "--times any"],
        ),
        (
            "r.csv",
            "user_id,item_id,timestamp\nu,a,2020-01-01\nu,b,2099-01-01\n",
            ["line 3", "2099-01-01", "future"],
        ),
        (
            "r.csv",
            "user_id,item_id,timestamp\nu,a,1600000000\nu,b,0\n",
            ["line 3", "is 0, but others are moments in seconds"],
        ),
        (
            "r.csv",
            "user_id,item_id,timestamp\nu,a,18500.5\nu,b,1600000000\n",
            ["line 2", "is 18500.5, but others", "--times any"],
        ),
        ("r.csv", CSV + "9007199254740993.0,c,3\n", ["line 5", "`user_id` is a rounded number"]),
        ("r.csv", CSV + "u\u2028v,c,3\n", ["line 5", "`user_id` holds a tab, a line end"]),
        (
            "r.jsonl",
            JSONL + '{"user_id": 7, "item_id": "a", "timestamp": 1}\n',
            ["line 4", "`user_id` is of mixed", "a text in", "line 1"],
        ),
        (
            "r.jsonl",
            JSONL + '{"user_id": "u", "item_id": [1], "timestamp": 1}\n',
            ["line 4", "`item_id` is of type array"],
        ),
        (
            "r.jsonl",
            JSONL + '{"user_id": "u", "item_id": "a", "timestamp": true}\n',
            ["line 4", "`timestamp` is of type boolean"],
        ),
        ("s.txt", "u1 a b\n\n u2 a\tb c\nu3 a nan b\n", ["line 4", "`item` is NaN"]),
        ("r.dat", CSV, ["ending `.dat`", ".parquet", "Name the format"]),
        ("r.parquet", CSV, ["cannot be read as parquet"]),
    ],
)
def test_bad_files_are_refused_by_line(tmp_path, name, text, words):
    message = refusal(put(tmp_path / name, text))
    assert str(tmp_path / name) in message
    for word in words:
        assert word in message


def test_bad_parquet_rows_and_columns(tmp_path):
    pq.write_table(
        pa.table({"user_id": ["u", None], "item_id": ["a", "b"], "timestamp": [1, 2]}),
        tmp_path / "r.parquet",
    )
    assert "row 2: `user_id` is empty" in refusal(tmp_path / "r.parquet")
    assert "no column `when`" in refusal(tmp_path / "r.parquet", time_column="when")


def test_numbers_that_are_no_moments_are_only_compared(tmp_path):
    path = put(tmp_path / "r.csv", CSV + "u1,c,4000000000\nu1,c,4000000000000\n")
    assert [int(row[3]) for row in load(path, times="any")][3:] == [
        4_000_000_000,
        4_000_000_000_000,
    ]


def test_wrong_values_in_parquet(tmp_path):
    def wrong(**columns: object) -> str:
        values = {"user_id": [1, 2], "item_id": [1, 2], "timestamp": [1, 2]} | columns
        pq.write_table(pa.table(values), tmp_path / "r.parquet")
        return refusal(tmp_path / "r.parquet")

    assert "row 2: `user_id` is NaN" in wrong(user_id=[1.0, float("nan")])
    assert "row 2: `item_id` is a rounded number" in wrong(item_id=[1.0, 1.5e19])
    assert "row 2: `item_id` is empty" in wrong(item_id=[1, None])
    assert "row 1: `user_id` is a rounded number" in wrong(user_id=[2.0**53, 1.0])
    assert "the column `item_id` is of type BIGINT[]" in wrong(item_id=[[1], [2]])
    assert "the column `user_id` is of type BOOLEAN" in wrong(user_id=[True, False])
    assert "row 2: the time in column `timestamp` is in seconds" in wrong(
        timestamp=[1_700_000_000_000, 1_700_000_000]
    )
    big = pa.table(
        {"user_id": pa.array([2**64 - 1], pa.uint64()), "item_id": ["9" * 40], "timestamp": [1]}
    )
    pq.write_table(big, tmp_path / "r.parquet")
    assert load(tmp_path / "r.parquet") == [
        (1, str(2**64 - 1), "9" * 40, 1)
    ]  # beyond 64 bits, exactly


def test_rows_of_several_files_are_numbered_through_and_named_by_their_own(tmp_path):
    paths = [put(tmp_path / "a.csv", CSV), put(tmp_path / "b.csv", CSV.replace("u1,", "v1,"))]
    with duckdb.connect() as connection:
        assert load_interactions(connection, list(map(plain, paths)), PrepareConfig()) == 6
        rows = connection.execute("SELECT row_number FROM interactions ORDER BY 1").fetchall()
        assert [row[0] for row in rows] == [1, 2, 3, 4, 5, 6]
    put(paths[1], CSV + "u,a,4000000000\n")
    with (
        duckdb.connect() as connection,
        pytest.raises(DataError, match=r"b\.csv, line 5: .* in the future"),
    ):
        load_interactions(connection, list(map(plain, paths)), PrepareConfig())
    put(paths[1], CSV + "u,a,2020-01-01\n")
    with (
        duckdb.connect() as connection,
        pytest.raises(DataError, match=r"b\.csv, line 5: the time `2020-01-01`"),
    ):
        load_interactions(connection, list(map(plain, paths)), PrepareConfig())


def test_wrong_encoding(tmp_path):
    (tmp_path / "l.csv").write_bytes(CSV.encode() + b"u\xff,a,1\n")
    assert "line 5" in refusal(tmp_path / "l.csv")


def test_missing_file_names_the_sets(tmp_path):
    message = refusal(tmp_path / "none.csv")
    assert "There is no file" in message
    assert "ml-100k" in message


def test_format_can_be_named(tmp_path):
    assert load(put(tmp_path / "r.dat", CSV), format="csv") == ROWS
    assert detect_format(plain(put(tmp_path / "R.CSV", CSV))) == "csv"


def test_titles_first_one_counts_and_tsv_has_no_quotes(tmp_path):
    path = put(tmp_path / "t.tsv", 'item_id\ttitle\na\t"Alpha\nb\t\na\tsecond\nc\tGamma, the\n')
    with duckdb.connect() as connection:
        load_titles(connection, plain(path), "item_id", "title")
        assert connection.execute("SELECT * FROM titles ORDER BY ALL").fetchall() == [
            ("a", '"Alpha'),
            ("c", "Gamma, the"),
        ]
    with duckdb.connect() as connection, pytest.raises(DataError, match="cannot hold titles"):
        load_titles(connection, plain(put(tmp_path / "t.txt", "a b")), "item_id", "title")
    with (
        duckdb.connect() as connection,
        pytest.raises(DataError, match=r"no column `name`.*--titles-title-column"),
    ):
        load_titles(connection, plain(path), "item_id", "name")


def test_named_source(tmp_path, monkeypatch):
    folder = tmp_path / "recbole" / "dataset_example" / "ml-100k"
    with pytest.raises(DataError, match=r"pip install --no-deps recbole==1\.2\.1"):
        named_source("ml-100k", tmp_path)
    with pytest.raises(DataError, match="The named sets are: ml-100k"):
        named_source("ml-1m", tmp_path)
    folder.mkdir(parents=True)
    (folder / "ml-100k.inter").write_text("user_id:token\n")
    assert named_source("ml-100k", tmp_path).titles is None
    (folder / "ml-100k.item").write_text("item_id:token\n")
    (tmp_path / "recbole" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    result = named_source("ml-100k", None)
    assert (result.interactions, result.titles) == (
        folder / "ml-100k.inter",
        folder / "ml-100k.item",
    )
    assert result.columns["titles_title_column"] == "movie_title"
