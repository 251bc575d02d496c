"""What rows mean: what could be read wrong without a word is refused, and remedies work."""

from __future__ import annotations

import re
import shlex
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mltfr_dist.cli import build_parser, main, section_from
from mltfr_dist.config import PrepareConfig
from mltfr_dist.data.sources.inputs import InputFile
from mltfr_dist.data.sources.read import load_interactions, load_titles
from mltfr_dist.errors import ConfigError, DataError

HEADER = "user_id,item_id,timestamp\n"


def load(folder: Path, files: dict[str, str | bytes | pa.Table], **values: object) -> list[tuple]:
    """Rows (user, item, time) of files that are written first."""
    given = []
    for name, content in files.items():
        path = folder / name
        if isinstance(content, pa.Table):
            pq.write_table(content, path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        given.append(InputFile(path, name, path.suffix.lower()))
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        load_interactions(connection, given, PrepareConfig(**values), log=lambda _: None)
        rows = connection.execute("SELECT * FROM interactions ORDER BY row_number").fetchall()
    return [(user, item, float(time)) for _, user, item, time in rows]


def refusal(folder: Path, files: dict[str, str | bytes | pa.Table], **values: object) -> str:
    with pytest.raises((DataError, ConfigError)) as caught:
        load(folder, files, **values)
    assert caught.value.remedy
    assert "\n" not in str(caught.value)
    return str(caught.value)


def options_of(message: str) -> dict[str, object]:
    """What the command line makes of the options that a remedy names, typed as they stand."""
    result = re.search(
        r"--(format|no-header|delimiter).*?(?=[;.(]? ?(\(|; or|If it|$|\.$))", message
    )
    assert result, message
    words = shlex.split(result.group(0).rstrip("."))
    options = build_parser().parse_args(["prepare", "source", "output", *words])
    return section_from(PrepareConfig, options).model_dump(exclude_unset=True)


def times(*values: str) -> dict[str, str]:
    return {"a.csv": HEADER + "".join(f'u{i},i{i},"{value}"\n' for i, value in enumerate(values))}


def users(*values: str) -> dict[str, str]:
    return {"a.csv": HEADER + "".join(f'"{value}",i,{i}\n' for i, value in enumerate(values))}


def micros(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1e6


# --- times --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "moment"),
    [
        ("2015-01-01 10:00:00 UTC", "2015-01-01T10:00:00"),
        ("2015-01-01 10:00:00 GMT", "2015-01-01T10:00:00"),
        ("2014-04-07T10:51:09.277Z", "2014-04-07T10:51:09.277"),
        ("2015-01-01T10:00:00+02:00", "2015-01-01T08:00:00"),
        ("2015-01-01T10:00:00-0530", "2015-01-01T15:30:00"),
        ("2015-01-01 10:00:00.123456000", "2015-01-01T10:00:00.123456"),
        ("2015/01/05", "2015-01-05T00:00:00"),
        ("2015-1-5", "2015-01-05T00:00:00"),
    ],
)
def test_dates_that_begin_with_the_year(tmp_path, value, moment):
    assert load(tmp_path, times(value))[0][2] == micros(moment)


@pytest.mark.parametrize(
    ("values", "pattern", "moment"),
    [
        (["01/02/2019", "13/02/2019"], "%d/%m/%Y", "2019-02-01T00:00:00"),
        (["01/02/2019", "02/13/2019"], "%m/%d/%Y", "2019-01-02T00:00:00"),
        (["05-01-20"], "%y-%m-%d", "2005-01-20T00:00:00"),
        (["Tue Apr 03 18:00:09 +0000 2012"], "%a %b %d %H:%M:%S %z %Y", "2012-04-03T18:00:09"),
        (["Tue Apr 03 18:00:09 +0200 2012"], "%a %b %d %H:%M:%S %z %Y", "2012-04-03T16:00:09"),
        (["2015-01-01 10:00:00 Europe/Berlin"], "%Y-%m-%d %H:%M:%S %Z", "2015-01-01T09:00:00"),
        (["11/12/2019 9:05:58 PM"], "%m/%d/%Y %I:%M:%S %p", "2019-11-12T21:05:58"),
        (["20190105"], "%Y%m%d", "2019-01-05T00:00:00"),
    ],
)
def test_time_format(tmp_path, values, pattern, moment):
    assert load(tmp_path, times(*values), time_format=pattern)[0][2] == micros(moment)
    if pattern != "%Y%m%d":  # as numbers they are in order
        message = refusal(tmp_path, times(*values))
        assert f"line 2: the time `{values[0]}`" in message
        assert f"--time-format '{pattern}'" in message


def test_time_format_of_whole_numbers_in_parquet(tmp_path):
    table = pa.table({"user_id": [1, 2], "item_id": [1, 2], "timestamp": [31122018, 11012019]})
    rows = load(tmp_path, {"a.parquet": table}, time_format="%d%m%Y")
    assert [row[2] for row in rows] == [micros("2018-12-31"), micros("2019-01-11")]
    moments = table.set_column(2, "timestamp", pa.array([1, 2], pa.timestamp("s")))
    assert "--time-format" in refusal(tmp_path, {"a.parquet": moments}, time_format="%d%m%Y")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["12/1/19"], ["`12/1/19`", "cannot be known", "'%d/%m/%y'", "'%m/%d/%y'"]),
        (["05-01-20", "06-01-20"], ["`05-01-20`", "'%y-%m-%d'", "'%d-%m-%y'", "'%m-%d-%y'"]),
        (["31122018", "11012019"], ["line 2", "year comes last", "--times any"]),
        (["31122018", "01012019"], ["line 3", "`01012019`", "'%d%m%Y'"]),
        (["1970-01-01"], ["line 2", "before 1985", "--times any"]),
        (["2015-01-01", "0015-01-01"], ["line 3", "before 1985"]),
        (["9999-12-31"], ["line 2", "in the future"]),
        (["2015-01-01 (BC)"], ["`2015-01-01 (BC)`"]),
        (["epoch"], ["`epoch`"]),
        (["inf"], ["`inf`"]),
        (["1.7E+09"], ["`1.7E+09`", "without exponent"]),
        (["7", "1_000"], ["line 3", "`1_000`"]),
        (["7", "007"], ["line 3", "`007`"]),
        (["1700000000.12345678912"], ["at most 9 decimals"]),
        (["2015-01-01 10:00:00.1234567"], ["to the microsecond"]),
        (["5", "None"], ["line 3", "`None`"]),
        (["2015-01-01 10:00 PM"], ["'%Y-%m-%d %I:%M %p'"]),
    ],
)
def test_times_that_cannot_be_meant(tmp_path, values, words):
    message = refusal(tmp_path, times(*values))
    for word in words:
        assert word in message


def test_times_any_only_compares(tmp_path):
    for value in ("1970-01-01", "9999-12-31", "11012019"):
        assert load(tmp_path, times(value), times="any")
    assert "`05-01-20`" in refusal(tmp_path, times("05-01-20"), times="any")


@pytest.mark.parametrize(
    ("pattern", "word"),
    [
        ("%d/%m", "no year"),
        ("%Q", "%Q"),
        ("%Y %I", "%p"),
        ("%Y.%n", "microsecond"),
        ("dd", "no year"),
    ],
)
def test_time_formats_that_cannot_be_used(tmp_path, pattern, word):
    message = refusal(tmp_path, times("x"), time_format=pattern)
    assert f"--time-format '{pattern}'" in message
    assert word in message


def test_parquet_times_are_exact_or_refused(tmp_path):
    def moments(array: pa.Array) -> dict[str, pa.Table]:
        return {"a.parquet": pa.table({"user_id": ["u"], "item_id": ["a"], "timestamp": array})}

    nanos = pa.array([1_500_000_000_123_456_789], pa.timestamp("ns"))
    assert load(tmp_path, moments(nanos))[0][2] == pytest.approx(1_500_000_000_123_456.789, abs=0.3)
    for unit in ("s", "ms", "us", "ns"):
        scale = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
        array = pa.array([1_500_000_000 * scale], pa.timestamp(unit, tz="UTC"))
        assert load(tmp_path, moments(array))[0][2] == 1.5e15
    message = refusal(tmp_path, moments(pa.array([1.7e9], pa.float32())))
    assert "row 1: `timestamp` is a rounded number, 1700000000 (float32)" in message
    assert "(float64)" in refusal(tmp_path, moments(pa.array([1.7e18], pa.float64())))
    assert load(tmp_path, moments(pa.array([1.7e9], pa.float64())))[0][2] == 1.7e9


# --- ids ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["None", "null", "NULL", r"\N", "NA", "<NA>", "N/A", "nil", "NaT", "undefined", "inf"]
)
def test_nulls_by_other_names(tmp_path, name):
    message = refusal(tmp_path, users("a", name))
    assert "line 3: `user_id`" in message
    assert f"--null '{name}' --missing drop" in message
    assert [row[0] for row in load(tmp_path, users("a", name), null=(name,), missing="drop")] == [
        "a"
    ]
    assert "line 3: `user_id` is empty" in refusal(tmp_path, users("a", name), null=(name,))
    assert [row[0] for row in load(tmp_path, users("a", name), ids="any")] == ["a", name]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("u1", "u1 "),
        ("u1", " u1"),
        ("café", "cafe\u0301"),
        ("u1", "u1\u200b"),
        ("7", "\uff17"),
        ("0", "-0"),
        ("7", "007"),
        ("7", "+7"),
        ("\u200bx", "x\u00ad"),
    ],
)
def test_ids_that_are_one_written_in_two_ways(tmp_path, one, other):
    message = refusal(tmp_path, users("z", one, "y", other))
    assert "a.csv, line 3" in message
    assert "a.csv, line 5" in message
    assert ascii(other) in message
    assert "--ids any" in message
    assert len(load(tmp_path, users("z", one, "y", other), ids="any")) == 4
    assert [row[0] for row in load(tmp_path, users("z", other))] == ["z", other]  # alone: an id


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (["1e5"], ["rounded", "--ids any"]),
        (["true", "False"], ["true or false in every row"]),
        (["u\ufeff1"], ["control character"]),
        (["  "], ["line 2: `user_id` is empty", "--missing drop"]),
    ],
)
def test_ids_that_cannot_be_meant(tmp_path, values, words):
    message = refusal(tmp_path, users(*values))
    for word in words:
        assert word in message


def test_rows_without_a_value_are_left_out_on_demand(tmp_path):
    files = {"a.csv": HEADER + "u,a,1\n,b,2\nv, ,3\nw,c,\nx,d,5\n", "b.csv": HEADER + "y,e,6\n"}
    rows = [("u", "a", 1), ("x", "d", 5), ("y", "e", 6)]
    assert load(tmp_path, files, missing="drop") == rows
    files["b.csv"] += "y,e,soon\n"
    assert "b.csv, line 3: the time `soon`" in refusal(tmp_path, files, missing="drop")


def test_float_ids_beyond_what_they_keep(tmp_path):
    table = pa.table(
        {"user_id": pa.array([1, 2**24], pa.float32()), "item_id": [1, 2], "timestamp": [1, 2]}
    )
    message = refusal(tmp_path, {"a.parquet": table})
    assert "row 2: `user_id` is a rounded number, 16777216 (float32)" in message
    small = table.set_column(0, "user_id", pa.array([1.0, 2.0], pa.float32()))
    assert [row[0] for row in load(tmp_path, {"a.parquet": small})] == ["1.0", "2.0"]


def test_columns_and_keys_that_are_there_twice(tmp_path):
    assert "2 columns `item_id`" in refusal(
        tmp_path, {"a.csv": "user_id,item_id,item_id,timestamp\n1,2,3,4\n"}
    )
    assert "2 columns `item_id`" in refusal(
        tmp_path,
        {"a.inter": "user_id:token\titem_id:token\titem_id:float\ttimestamp:float\n1\t2\t3\t4\n"},
    )
    row = '{"user_id": "%s", "item_id": "a", "timestamp": 1, "user_id": 2}\n'
    assert "line 1: the object has the key `user_id` twice" in refusal(tmp_path, {"a.jsonl": row})
    nested = '{"user_id": 1, "item_id": "a", "timestamp": 1, "more": {"user_id": 2}}\n'
    assert load(tmp_path, {"a.jsonl": nested}) == [("1", "a", 1)]
    columns = [pa.array([1]), pa.array([2]), pa.array([3]), pa.array([4])]
    table = pa.Table.from_arrays(columns, names=["user_id", "item_id", "timestamp", "user_id"])
    assert "2 columns `user_id`" in refusal(tmp_path, {"a.parquet": table})
    cased = pa.Table.from_arrays(columns, names=["User_ID", "item_id", "timestamp", "user_id"])
    assert load(tmp_path, {"a.parquet": cased}) == [(4, 2, 3)]


# --- one kind in all files ----------------------------------------------------


def parquet(**columns: object) -> pa.Table:
    return pa.table({"user_id": [1], "item_id": [1], "timestamp": [1]} | columns)


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        (
            HEADER + "7,a,1\n",
            HEADER + "7.0,b,2\n",
            ["a.csv, line 2", "b.csv, line 2", "mixed types"],
        ),
        (parquet(user_id=["x"]), parquet(user_id=[1.0]), ["is numbers with a point, and text"]),
        (parquet(), parquet(user_id=["x"]), ["whole numbers", "text"]),
        (parquet(), parquet(timestamp=[1.5]), ["`timestamp`", "whole numbers", "point"]),
        (
            parquet(timestamp=pa.array([1], pa.timestamp("s"))),
            parquet(),
            ["`timestamp`", "date-times", "whole numbers"],
        ),
        (HEADER + "7,a,1\n", HEADER + "7,a,2015-01-01\n", ["b.csv, line 2", "`2015-01-01`"]),
    ],
)
def test_kinds_are_those_of_the_whole_source(tmp_path, one, other, words):
    ending = "csv" if isinstance(one, str) else "parquet"
    for first, second in ((one, other), (other, one)):
        message = refusal(tmp_path, {f"a.{ending}": first, f"b.{ending}": second})
        assert f"a.{ending}" in message or ending == "csv"
        assert f"b.{ending}" in message
        if first is one:
            for word in words:
                assert word in message


def test_json_numbers_and_texts_are_two_kinds(tmp_path):
    row = '{"user_id": %s, "item_id": "a", "timestamp": 1}\n'
    message = refusal(tmp_path, {"a.jsonl": row % 7, "b.jsonl": row % '"7"'})
    assert "b.jsonl, line 1" in message
    assert "`user_id` is a text, and a number in a.jsonl, line 1" in message


def test_whole_numbers_of_other_widths_are_one_kind(tmp_path):
    wide = parquet(user_id=pa.array([2**64 - 1], pa.uint64()), timestamp=pa.array([2], pa.int32()))
    rows = load(tmp_path, {"a.parquet": parquet(user_id=[7]), "b.parquet": wide})
    assert rows == [("7", 1, 1), (str(2**64 - 1), 1, 2)]
    assert load(tmp_path, {"a.csv": HEADER, "b.csv": HEADER + "1,2,3\n", "c.csv": ""}) == [
        ("1", "2", 3)
    ]


def test_partitions_are_columns(tmp_path):
    (tmp_path / "a.csv").write_text("item_id,timestamp\na,1\n")
    file = InputFile(tmp_path / "a.csv", "user_id=7/a.csv", ".csv", {"user_id": "7"})
    pq.write_table(pa.table({"item_id": ["b"], "timestamp": [1]}), tmp_path / "a.parquet")
    other = InputFile(tmp_path / "a.parquet", "user_id=7/a.parquet", ".parquet", {"user_id": "7"})
    (tmp_path / "a.jsonl").write_text('{"item_id": "c", "timestamp": 1}\n')
    third = InputFile(tmp_path / "a.jsonl", "user_id=7/a.jsonl", ".jsonl", {"user_id": "7"})
    for each, item in ((file, "a"), (other, "b"), (third, "c")):
        with duckdb.connect() as connection:
            load_interactions(connection, [each], PrepareConfig(), log=lambda _: None)
            assert connection.execute("SELECT user_id, item_id FROM interactions").fetchall() == [
                ("7", item)
            ]
        clash = InputFile(each.path, each.name, each.ending, {"item_id": "7", "user_id": "7"})
        with (
            duckdb.connect() as connection,
            pytest.raises(DataError, match="so has the name of its folder"),
        ):
            load_interactions(connection, [clash], PrepareConfig(), log=lambda _: None)


# --- headers and delimiters ---------------------------------------------------

ROWS = [("196", "242", 881250949), ("186", "302", 891717742)]
POSITIONS = {"header": False, "user_column": "1", "item_column": "2", "time_column": "4"}


@pytest.mark.parametrize("mark", [",", ";", "::", "|", "\t", " "])
def test_without_header_and_by_any_delimiter(tmp_path, mark):
    text = "196,242,3,881250949\n186,302,3,891717742\n".replace(",", mark)
    assert load(tmp_path, {"a.csv": text}, delimiter=mark, **POSITIONS) == ROWS
    bom = {"a.csv": "\ufeff" + text.replace("\n", "\r\n") + "\r\n"}
    assert load(tmp_path, bom, delimiter=mark, **POSITIONS) == ROWS
    message = refusal(
        tmp_path, {"a.csv": text + f"u{mark}{mark}3{mark}5\n"}, delimiter=mark, **POSITIONS
    )
    assert "a.csv, line 3: `2` is empty" in message


def test_the_advice_for_a_file_without_header_loses_no_row(tmp_path):
    files = {"a.csv": "196,242,3,881250949\n186,302,3,891717742\n"}
    message = refusal(tmp_path, files)
    assert "--no-header" in message
    assert load(tmp_path, files, **options_of(message)) == ROWS
    lost = {"user_column": "196", "item_column": "242", "time_column": "881250949"}
    message = refusal(tmp_path, files, **lost)
    assert "looks like a value" in message
    assert load(tmp_path, files, **options_of(message)) == ROWS
    message = refusal(tmp_path, files, header=False)
    assert load(tmp_path, files, **options_of(message)) == ROWS
    semicolons = {"a.csv": HEADER.replace(",", ";") + "1;2;3\n"}
    message = refusal(tmp_path, semicolons)
    assert load(tmp_path, semicolons, **options_of(message)) == [("1", "2", 3)]


def test_headers(tmp_path):
    pandas = {"user_column": "0", "item_column": "1", "time_column": "2"}
    assert load(tmp_path, {"a.csv": "0,1,2\n5,6,7\n"}, **pandas) == [("5", "6", 7)]
    by_number = {"header": False, "user_column": "1", "item_column": "2"}
    message = refusal(tmp_path, {"a.csv": HEADER + "1,2,3\n"}, order="file", **by_number)
    assert "line 1: `user_id, item_id` looks like column names" in message
    for wrong in ("0", "4", "-1", "user_id"):
        message = refusal(tmp_path, {"a.csv": "1,2,3\n"}, **by_number | {"item_column": wrong})
        assert f"no column `{wrong}`" in message
        assert "1 to 3" in message


def test_lines_before_the_header_are_skipped(tmp_path):
    before = '# made "by, hand\n\n'
    text = before + HEADER + "u,a,1\nv,b,2\n"
    rows = [("u", "a", 1), ("v", "b", 2)]
    assert load(tmp_path, {"a.csv": text}, skip_rows=2) == rows
    numbers = {"header": False, "user_column": "1", "item_column": "2", "time_column": "3"}
    assert load(tmp_path, {"a.csv": text}, skip_rows=3, **numbers) == rows
    assert "a.csv, line 6: `item_id` is empty" in refusal(
        tmp_path, {"a.csv": text + "w,,3\n"}, skip_rows=2
    )
    assert load(tmp_path, {"a.csv": "\n\n" + HEADER + "u,a,1\n"}) == [("u", "a", 1)]


def test_quotes_and_encodings(tmp_path):
    assert load(tmp_path, {"a.csv": HEADER + "'a,b',c,7\n"}, quote="'") == [("a,b", "c", 7)]
    assert load(tmp_path, {"a.csv": HEADER + '"a,c,7\n'}, quote="") == [('"a', "c", 7)]
    latin = {"a.csv": (HEADER + "é,c,7\n").encode("latin-1")}
    assert load(tmp_path, latin, encoding="latin-1") == [("é", "c", 7)]
    assert "--encoding" in refusal(tmp_path, latin)
    for wrong in ({"delimiter": "\n"}, {"delimiter": ""}, {"quote": "''"}, {"delimiter": ":::::"}):
        with pytest.raises(ValueError, match="bytes of text"):
            PrepareConfig(**wrong)
    assert PrepareConfig(delimiter=r"\t").delimiter == "\t"


def test_file_order_is_the_time(tmp_path):
    files = {"a.csv": "user_id,item_id\nu,a\nv,b\n", "b.csv": "user_id,item_id\nu,c\n"}
    assert load(tmp_path, files, order="file") == [("u", "a", 1), ("v", "b", 2), ("u", "c", 3)]
    table = pa.table({"user_id": [1], "item_id": [2]})
    assert load(tmp_path, {"a.parquet": table}, order="file") == [(1, 2, 1)]
    row = '{"user_id": 1, "item_id": 2}\n'
    assert load(tmp_path, {"a.jsonl": "\n" + row + row}, order="file")[1][2] == 3


# --- sequence text that is none -----------------------------------------------

LOGS = {
    "u1 i1 5 1500000000\nu2 i2 3 1500000001\nu3 i3 4 1500000002\n": [
        1500000000,
        1500000001,
        1500000002,
    ],
    "u1 i1 1500000000000\nu2 i2 1500000000001\n": [1500000000000, 1500000000001],
    "u1\ti1\t4.0\t2015-01-01\nu2\ti2\t3.5\t2015-01-02\n": [
        micros("2015-01-01"),
        micros("2015-01-02"),
    ],
    "u1 2015-01-01T10:00:00Z i1\nu2 2015-02-03T10:00:00Z i2\n": [
        micros("2015-01-01T10:00:00"),
        micros("2015-02-03T10:00:00"),
    ],
    "user item time\nu1 i1 1500000000\nu2 i2 1500000001\n": [1500000000, 1500000001],
    "u1 i11 5\nu2 i21 3\nu3 i30 4\n": [1, 2, 3],
}


@pytest.mark.parametrize("text", LOGS)
def test_a_log_with_one_line_a_user_is_no_sequence_text(tmp_path, text):
    message = refusal(tmp_path, {"a.txt": text})
    assert "looks like a log" in message
    rows = load(tmp_path, {"a.txt": text}, **options_of(message))
    assert [row[:2] for row in rows] == [
        (f"u{i}", f"i{i}" if len(rows) == 2 or "150" in text else row[1])
        for i, row in enumerate(rows, 1)
    ]
    assert [row[2] for row in rows] == LOGS[text]
    assert len(load(tmp_path, {"a.txt": text}, times="any")) > len(rows)


def test_real_sequences_of_one_length_are_read(tmp_path):
    for text in (
        "u1 a b c\nu2 b c a\n",
        "1 5 3 4\n2 3 1 2\n3 9 9 9\n",
        "1 1500000000 1500000001\n",
    ):
        assert load(tmp_path, {"a.txt": text})


def test_several_lines_a_user_name_the_way_to_read_them(tmp_path):
    assert "--format pairs" in refusal(tmp_path, {"a.txt": "1 1\n1 2\n2 1\n"})
    text = "u1 a x\nu2 b y\nu1 c z\n"
    assert "--format csv --delimiter ' ' --no-header" in refusal(tmp_path, {"a.txt": text})


# --- the command --------------------------------------------------------------


def test_the_command_reads_a_file_without_header(tmp_path, capsys):
    rows = [
        f"{user}::{item}::5::{978300000 + 10 * user + item}\n"
        for user in range(6)
        for item in range(6)
    ]
    (tmp_path / "ratings.dat").write_text("".join(rows))
    command = ["prepare", str(tmp_path / "ratings.dat"), str(tmp_path / "out")]
    assert main(command) == 2
    assert "--format movielens-1m" in capsys.readouterr().err
    assert main([*command, "--format", "movielens-1m", "--null", "NA", "--null", r"\N"]) == 0
    printed = capsys.readouterr().out
    assert "Ratings are not read" in printed
    assert main([*command, "--format", "movielens-1m", "--null", "NA", "--null", r"\N"]) == 0
    assert "verified and reused" in capsys.readouterr().out
    assert not list(tmp_path.glob(".*.partial"))


def test_titles_twice_in_the_header(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("item_id,title,title\n1,a,b\n")
    with duckdb.connect() as connection, pytest.raises(DataError, match="2 columns `title`"):
        load_titles(connection, InputFile(path, "t.csv", ".csv"), "item_id", "title")
