"""Parquet: one row an interaction, with columns of numbers, text or moments."""

from __future__ import annotations

import re
from collections import Counter

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from mltfr_dist.data.delimited import column_index
from mltfr_dist.data.formats import Format
from mltfr_dist.data.inputs import InputFile
from mltfr_dist.data.readers import (
    SINGLE,
    Scan,
    one,
    path_literal,
    quote_identifier,
    reading,
    unreadable,
    value_sql,
)
from mltfr_dist.errors import DataError

_INTEGERS = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER"}
_WIDE = {"UBIGINT", "HUGEINT", "UHUGEINT"}
_EXACT = {"FLOAT": 2**24, "DOUBLE": 2**53}
"""Up to where each type keeps whole numbers."""


def reader(file: InputFile) -> str:
    """A Parquet file as a table of SQL; a folder's name adds no column."""
    return (
        f"read_parquet({path_literal(file)}, file_row_number=true, binary_as_string=true, "
        "hive_partitioning=false)"
    )


def column_types(
    connection: duckdb.DuckDBPyConnection,
    file: InputFile,
    columns: list[str],
    *,
    titles: bool = False,
) -> list[tuple[str, str]]:
    """DuckDB's name and type of each of ``columns``.

    Raises:
        DataError: the file is no Parquet, or a column is missing or there twice.
    """
    with reading(file, "parquet"):
        described = connection.execute(f"DESCRIBE SELECT * FROM {reader(file)}").fetchall()
    try:
        header = list(pq.read_schema(file.path).names)
    except (OSError, pa.ArrowException) as error:
        raise unreadable(file, "parquet", error) from None
    twice = [name for name, times in Counter(header).items() if times > 1 and name in columns]
    if twice:
        column_index(file, twice[0], header)
    places = [column_index(file, name, header, titles=titles) for name in columns]
    return [(str(described[place][0]), str(described[place][1])) for place in places]


def open_parquet(
    connection: duckdb.DuckDBPyConnection,
    file: InputFile,
    layout: Format,
    columns: list[str],
    aliases: list[str],
    as_text: frozenset[str] = frozenset(),
) -> Scan:
    """Make ready to read ``columns`` as ``aliases``: whole numbers as they are, but for those ``as_text``.

    Raises:
        DataError: as :func:`column_types`, and for types that hold no single values or have rounded them.
    """
    types = column_types(connection, file, columns, titles="title" in aliases)
    fields, time_kind = [], "text"
    kinds: dict[str, tuple[str, str]] = {}
    for column, alias, (name, type) in zip(columns, aliases, types):
        if type == "BOOLEAN" or type.endswith("]") or type.startswith(("STRUCT", "MAP", "UNION")):
            raise DataError(
                f"{file.name}: the column `{column}` is of type {type}.",
                rule=SINGLE,
                remedy="Write it as numbers, text or times; lists, with one row a user, are read "
                "with --format parquet-lists.",
            )
        _refuse_rounded(connection, file, column, name, type)
        expression = f"CAST({quote_identifier(name)} AS VARCHAR)"
        if type in _INTEGERS and alias not in as_text:
            expression = f"CAST({quote_identifier(name)} AS BIGINT)"
        if alias == "time":
            time_kind = _time_kind(type)
            if time_kind == "integers" and alias in as_text:
                time_kind = "numbers"
            expression = _time_sql(quote_identifier(name), type) or expression
        kinds[alias] = (_kind(type), file.name)
        fields.append(f"{value_sql(expression, layout.null)} AS {alias}")
    return Scan(
        f"SELECT file_row_number + 1 AS row_number, {', '.join(fields)} FROM {reader(file)}",
        columns,
        lambda row: f"{file.name}, row {row}",
        time_kind=time_kind,
        kinds=kinds,
    )


def time_value(type: str) -> tuple[str, str]:
    """The time in the column ``time`` of this type as SQL, and its kind."""
    plain = "CAST(time AS BIGINT)" if type in _INTEGERS else "CAST(time AS VARCHAR)"
    return _time_sql("time", type) or plain, _time_kind(type)


def not_integers(types: list[tuple[str, str]], aliases: list[str]) -> frozenset[str]:
    """Which of the columns are not of a type that fits 64-bit integers."""
    return frozenset(alias for alias, (_, type) in zip(aliases, types) if type not in _INTEGERS)


def _kind(type: str) -> str:
    if type in _INTEGERS | _WIDE or re.fullmatch(r"DECIMAL\(\d+,0\)", type):
        return "whole numbers"
    if type in _EXACT or type.startswith("DECIMAL"):
        return "numbers with a point"
    if type.startswith("TIMESTAMP") or type == "DATE":
        return "date-times"
    return "text" if type == "VARCHAR" else type


def _time_kind(type: str) -> str:
    if type in _INTEGERS:
        return "integers"
    if _kind(type) == "date-times":
        return "moments"
    return "numbers" if "numbers" in _kind(type) else "text"


def _time_sql(name: str, type: str) -> str | None:
    """Moments as microseconds since 1970 UTC, exactly."""
    if type == "TIMESTAMP_NS":
        thousandths = "CAST(0.001 AS DECIMAL(3, 3))"
        return f"CAST(CAST(epoch_ns({name}) AS DECIMAL(19)) * {thousandths} AS DECIMAL(38, 9))"
    if type.startswith("TIMESTAMP") or type == "DATE":
        return f"CAST(epoch_us({name}) AS DECIMAL(38, 9))"
    return None


def _refuse_rounded(
    connection: duckdb.DuckDBPyConnection, file: InputFile, column: str, name: str, type: str
) -> None:
    """Refuse floating point beyond which it skips whole numbers: different ids and times would merge."""
    if type not in _EXACT:
        return
    with reading(file, "parquet"):
        row, value = one(
            connection,
            f"SELECT min(file_row_number), arg_min({quote_identifier(name)}, file_row_number) "
            f"FROM {reader(file)} WHERE isfinite({quote_identifier(name)}) "
            f"AND abs({quote_identifier(name)}) >= {_EXACT[type]}",
        )
    if row is not None:
        bits = 32 if type == "FLOAT" else 64
        raise DataError(
            f"{file.name}, row {row + 1}: `{column}` is a rounded number, {value:.0f} "
            f"(float{bits}).",
            rule=f"float{bits} keeps whole numbers up to {_EXACT[type]:,} only; beyond it different "
            "ids and times merge.",
            remedy="Write the column as text or whole numbers, from the source it came from.",
        )
