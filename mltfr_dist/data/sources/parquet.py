"""Parquet: one row an interaction, with columns of numbers, text or moments."""

from __future__ import annotations

import re

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from mltfr_dist.data.sources.delimited import column_index
from mltfr_dist.data.sources.formats import Format
from mltfr_dist.data.sources.inputs import InputFile
from mltfr_dist.data.sources.readers import (
    SINGLE,
    Scan,
    constants,
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
    """SQL and DuckDB's type of each of ``columns``.

    Raises:
        DataError: the file is no Parquet, or a column is missing or there twice.
    """
    with reading(file, "parquet"):
        described = connection.execute(f"DESCRIBE SELECT * FROM {reader(file)}").fetchall()
    try:
        header = list(pq.read_schema(file.path).names)
    except (OSError, pa.ArrowException) as error:
        raise unreadable(file, "parquet", error) from None
    given, types = constants(file, header), []
    for name in columns:
        if name in given:
            types.append((given[name], "VARCHAR"))
            continue
        own, type = described[column_index(file, name, header, titles=titles)][:2]
        types.append((quote_identifier(own), str(type)))
    return types


def open_parquet(
    connection: duckdb.DuckDBPyConnection,
    file: InputFile,
    layout: Format,
    columns: list[str],
    aliases: list[str],
    as_text: frozenset[str] = frozenset(),
) -> Scan:
    """Make ready to read ``columns`` as ``aliases``, all but whole numbers and moments as text.

    Args:
        connection: reads the schema.
        file: the file.
        layout: the format, for values that mean a missing one.
        columns: names in the file.
        aliases: names in the scan.
        as_text: aliases whose whole numbers are text, too, since other files have others.

    Raises:
        DataError: as :func:`column_types`, and for types of no single values, or of rounded ones.
    """
    types = column_types(connection, file, columns, titles="title" in aliases)
    fields, time_kind = [], "text"
    kinds: dict[str, tuple[str, str]] = {}
    for column, alias, (value, type) in zip(columns, aliases, types):
        if type == "BOOLEAN" or type.endswith("]") or type.startswith(("STRUCT", "MAP", "UNION")):
            raise DataError(
                f"{file.name}: the column `{column}` is of type {type}.",
                rule=SINGLE,
                remedy="Write it as numbers, text or times; lists, with one row a user, are read "
                "with --format parquet-lists.",
            )
        _refuse_rounded(connection, file, column, value, type)
        expression = f"CAST({value} AS VARCHAR)"
        if type in _INTEGERS and alias not in as_text:
            expression = f"CAST({value} AS BIGINT)"
        if alias == "time":
            time_kind = _time_kind(type)
            if time_kind == "integers" and alias in as_text:
                time_kind = "numbers"
            expression = _time_sql(value, type) or expression
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
    if type in ("TIMESTAMP_NS", "TIMESTAMPTZ_NS"):
        thousandths = "CAST(0.001 AS DECIMAL(3, 3))"
        nanoseconds = f"CAST(epoch_ns(CAST({name} AS TIMESTAMP_NS)) AS DECIMAL(19))"
        return f"CAST({nanoseconds} * {thousandths} AS DECIMAL(38, 9))"
    if type.startswith("TIMESTAMP") or type == "DATE":
        return f"CAST(epoch_us({name}) AS DECIMAL(38, 9))"
    return None


def _refuse_rounded(
    connection: duckdb.DuckDBPyConnection, file: InputFile, column: str, value: str, type: str
) -> None:
    """Refuse floating point so large that it skips whole numbers: ids and times would merge."""
    if type not in _EXACT:
        return
    with reading(file, "parquet"):
        row, number = one(
            connection,
            f"SELECT min(file_row_number), arg_min({value}, file_row_number) "
            f"FROM {reader(file)} WHERE isfinite({value}) AND abs({value}) >= {_EXACT[type]}",
        )
    if row is not None:
        bits = 32 if type == "FLOAT" else 64
        raise DataError(
            f"{file.name}, row {row + 1}: `{column}` is a rounded number, {number:.0f} "
            f"(float{bits}).",
            rule=f"float{bits} keeps whole numbers up to {_EXACT[type]:,} only; beyond it "
            "different ids and times merge.",
            remedy="Write the column as text or whole numbers, from the source it came from.",
        )
