"""Formats whose lines Python takes apart: MIND, Netflix, and Python dicts."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import duckdb
import pyarrow as pa

from mltfr_dist.data.sources.formats import Format
from mltfr_dist.data.sources.inputs import InputFile
from mltfr_dist.data.sources.readers import Scan, no_rows, one, open_text, value_sql
from mltfr_dist.errors import DataError

_ROWS_PER_BATCH = 100_000
_MAX_LINE = 64_000_000
_MIND_TIME = "%m/%d/%Y %I:%M:%S %p"
_COLUMNS = ("user_id", "item_id", "time")


class Row(NamedTuple):
    """One interaction as text, and the line that it comes from; None where it is missing."""

    line: int
    user_id: str | None
    item_id: str | None
    time: str | None


def open_lines(
    connection: duckdb.DuckDBPyConnection, file: InputFile, name: str, layout: Format
) -> Scan:
    """Read all rows of a file of the format ``name`` into ``raw``.

    Raises:
        DataError: a line that is not of the format, or no rows.
    """
    if name == "mind":
        _read_mind(connection, file)
    else:
        rows = _netflix_rows(file) if name == "netflix" else _dict_rows(file, layout)
        _insert(connection, "raw", rows)
    if not one(connection, "SELECT count(*) FROM raw")[0]:
        raise no_rows(file)
    fields = ", ".join(f"{value_sql(column, layout.null)} AS {column}" for column in _COLUMNS)

    def where(row: int) -> str:
        sql = "SELECT line FROM raw WHERE row_number = $1"
        return f"{file.name}, line {one(connection, sql, [row])[0]}"

    def close() -> None:
        connection.execute("DROP TABLE IF EXISTS raw")

    names = ["user", "item", "time"] if name in ("mind", "netflix") else layout.columns
    kind = "moments" if name == "mind" else "text"
    if layout.time is None:
        fields, kind = fields.rpartition(", ")[0] + ", row_number AS time", "order"
    sql = f"SELECT row_number, {fields} FROM raw"
    return Scan(sql, names, where, close=close, time_kind=kind)


def _insert(connection: duckdb.DuckDBPyConnection, table: str, rows: Iterator[Row]) -> None:
    """Create ``table(row_number, line, user_id, item_id, time)``."""
    connection.execute(
        f"CREATE OR REPLACE TABLE {table}(row_number BIGINT, line BIGINT, user_id VARCHAR, "
        "item_id VARCHAR, time VARCHAR)"
    )
    count = 0
    while batch := list(itertools.islice(rows, _ROWS_PER_BATCH)):
        columns = dict(zip(Row._fields, zip(*batch)))
        numbers = range(count + 1, count + len(batch) + 1)
        types = {"line": pa.int64()}
        arrays = {
            key: pa.array(values, types.get(key, pa.string())) for key, values in columns.items()
        }
        connection.register("batch", pa.table({"row_number": numbers} | arrays))
        connection.execute(f"INSERT INTO {table} SELECT * FROM batch")
        connection.unregister("batch")
        count += len(batch)


def _text_lines(file: InputFile) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1."""
    with open_text(file) as handle:
        for number, line in enumerate(iter(lambda: handle.readline(_MAX_LINE), ""), 1):
            if len(line) == _MAX_LINE:
                raise _malformed(file, number, line, f"shorter than {_MAX_LINE:,} characters")
            line = line.rstrip("\r\n")
            if "\ufffd" in line:
                raise _malformed(file, number, line, "UTF-8 text")
            if line.strip():
                yield number, line


def _malformed(file: InputFile, number: int, line: str, wanted: str) -> DataError:
    return DataError(
        f"{file.name}, line {number}: `{line[:80]}` is not {wanted}.",
        rule="All lines of a file have one form.",
        remedy="Correct or remove that line, or name the file's true format with --format.",
    )


def _netflix_rows(file: InputFile) -> Iterator[Row]:
    """`movie:`, then `user,rating,date` lines of that movie."""
    movie = None
    for number, line in _text_lines(file):
        if line.endswith(":") and line[:-1].isdecimal():
            movie = line[:-1]
            continue
        fields = line.split(",")
        if movie is None or len(fields) != 3:
            raise _malformed(file, number, line, "`movie:`, nor `user,rating,date` below a movie")
        yield Row(number, fields[0], movie, fields[2])


def _dict_rows(file: InputFile, layout: Format) -> Iterator[Row]:
    """A Python dict a line, read as a literal: nothing in it is run."""
    for number, line in _text_lines(file):
        try:
            values = ast.literal_eval(line)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            values = None
        if not isinstance(values, dict):
            raise _malformed(file, number, line, "a Python dict of plain values")
        yield Row(
            number,
            *(_single(file, number, values.get(key), key) for key in layout.columns),
            *([] if layout.time is not None else [None]),
        )


def _single(file: InputFile, number: int, value: Any, key: str) -> str | None:
    if value is None or (isinstance(value, str | int | float) and not isinstance(value, bool)):
        return None if value is None else str(value)
    raise _malformed(file, number, f"{key}: {value!r}", "a number or a text")


def _read_mind(connection: duckdb.DuckDBPyConnection, file: InputFile) -> None:
    """Impressions that were clicked, and before all of them each user's history.

    Lines are `impression, user, time, history, impressions`, tab separated. A history has no times:
    its items get the microseconds before the earliest impression of the file, in their order, so
    that they come first and in no period of validation or test.
    """
    _insert(connection, "impressions", _mind_rows(file))
    parsed = f"epoch_us(try_strptime(time, '{_MIND_TIME}'))"
    bad = one(
        connection,
        f"SELECT min(line), arg_min(time, line) FROM impressions WHERE {parsed} IS NULL",
    )
    if bad[0] is not None:
        raise _malformed(file, bad[0], bad[1], "a time such as 11/15/2019 8:55:22 AM")
    connection.execute(
        "CREATE OR REPLACE TABLE raw AS WITH events AS (SELECT line, row_number, user_id, item_id, "
        f"{parsed} AS time FROM impressions WHERE item_id NOT LIKE '%:%'), "
        "histories AS (SELECT user_id, arg_min(line, (TIMES, line)) AS line, "
        "string_split(arg_min(item_id, (TIMES, line))[2:], ' ') AS items FROM impressions "
        "WHERE item_id LIKE ':%' GROUP BY user_id), "
        "past AS (SELECT line, user_id, unnest(items) AS item_id, "
        "unnest(range(1, len(items) + 1)) AS position, len(items) AS length FROM histories) "
        "SELECT row_number() OVER (ORDER BY line, is_event, place) AS row_number, line, user_id, "
        "item_id, CAST(time AS DECIMAL(38, 9)) AS time FROM ("
        "SELECT line, user_id, item_id, true AS is_event, row_number AS place, time FROM events "
        "UNION ALL SELECT line, user_id, item_id, false, position, "
        f"(SELECT min({parsed}) FROM impressions) - (length - position + 1) FROM past "
        "WHERE item_id <> '')".replace("TIMES", parsed)
    )
    connection.execute("DROP TABLE impressions")


def _mind_rows(file: InputFile) -> Iterator[Row]:
    """Of each line the history, as one text behind a colon, and each item that was clicked."""
    for number, line in _text_lines(file):
        fields = line.split("\t")
        if len(fields) != 5:
            raise _malformed(
                file,
                number,
                line,
                "`impression, user, time, history, impressions` with tabs between",
            )
        _, user, time, history, impressions = fields
        yield Row(number, user, ":" + history.strip(), time)
        for impression in impressions.split():
            item, _, label = impression.rpartition("-")
            if label not in ("0", "1") or not item or ":" in item:
                raise _malformed(file, number, impression, "an impression such as N123-1 or N123-0")
            if label == "1":
                yield Row(number, user, item, time)
