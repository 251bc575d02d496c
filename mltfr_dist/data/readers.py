"""Files of any supported format -> DuckDB tables of text columns, with every bad line named.

A file is read in file order and its rows are numbered, so that an error can say where it is.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import itertools
import re
from pathlib import Path
from typing import Any, TextIO

import duckdb

from mltfr_dist.errors import DataError

EMPTY = "({0} IS NULL OR trim(CAST({0} AS VARCHAR)) = '')"
"""SQL condition on the column {0}."""
_INTEGERS = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER"}
_MAX_LINE_BYTES = 64_000_000
_MAX_REJECTS = 1000
_SINGLE = "A user, an item and a time are single values: a number, a text or a date."


def quote_identifier(name: str) -> str:
    """``name`` as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def quote_text(value: str) -> str:
    """``value`` as an SQL string literal."""
    return "'" + value.replace("'", "''") + "'"


def read_columns(
    connection: duckdb.DuckDBPyConnection,
    path: Path,
    format: str,
    columns: list[str],
    table: str,
    names: list[str],
) -> None:
    """Create ``table(row_number, *names)`` from the named ``columns`` of a file with column names.

    All of it is text, but for Parquet's integers, which need no parsing; of a Parquet file it is a view.
    """
    # row_number() OVER () streams: DuckDB reads in file order and keeps that order (preserve_insertion_order).
    try:
        if format == "jsonl":
            read_lines(connection, path, "lines")
            pointers = [
                quote_text("/" + name.replace("~", "~0").replace("/", "~1")) for name in columns
            ]
            _check_json(connection, path, columns)
            _check_json_types(connection, path, columns, pointers, names)
            fields = [f"line ->> {pointer} AS {name}" for pointer, name in zip(pointers, names)]
            connection.execute(
                f"CREATE TABLE {table} AS SELECT row_number, {', '.join(fields)} FROM lines ORDER BY row_number"
            )
            connection.execute("DROP TABLE lines")
            return
        if format == "parquet":
            reader = f"read_parquet({_path_literal(path)}, file_row_number=true)"
            described = connection.execute(
                f"DESCRIBE SELECT * FROM read_parquet({_path_literal(path)})"
            ).fetchall()
            header = [str(row[0]) for row in described]
            chosen = [described[_column_index(path, name, header)] for name in columns]
            _refuse_types(path, {row[0]: row[1] for row in chosen})
            kinds = ["BIGINT" if row[1] in _INTEGERS else "VARCHAR" for row in chosen]
            fields = [
                f"CAST({quote_identifier(row[0])} AS {kind}) AS {name}"
                for row, kind, name in zip(chosen, kinds, names)
            ]
            connection.execute(
                f"CREATE VIEW {table} AS SELECT file_row_number + 1 AS row_number, {', '.join(fields)} FROM {reader}"
            )
            return
        header = _csv_header(path, format)
        reader = _csv_reader(path, format, len(header), f"rejects_{table}")
        fields = [
            f"CAST(c{_column_index(path, name, header)} AS VARCHAR) AS {new}"
            for name, new in zip(columns, names)
        ]
        connection.execute(
            f"CREATE TABLE {table} AS SELECT row_number() OVER () AS row_number, {', '.join(fields)} FROM {reader}"
        )
    except duckdb.OutOfMemoryException:
        raise
    except duckdb.Error as error:
        raise unreadable(path, format, error) from None
    _refuse_rejects(connection, path, f"rejects_{table}")


def read_lines(connection: duckdb.DuckDBPyConnection, path: Path, table: str) -> None:
    """Create ``table(row_number, line)``: the lines of a text file that are not blank; row_number counts all from 1."""
    # The unit separator is no legal character of JSON and none of ids: a line that holds one is refused, not cut.
    options = "delim='\x1f', quote='', escape='', header=false, columns={'line': 'VARCHAR'}, "
    options += _csv_options(path, "rejects_lines")
    connection.execute(
        f"CREATE TABLE {table} AS SELECT * FROM (SELECT row_number() OVER () AS row_number, line "
        f"FROM read_csv({_path_literal(path)}, {options})) WHERE NOT {EMPTY.format('line')}"
    )
    _refuse_rejects(connection, path, "rejects_lines")


def _refuse_types(path: Path, kinds: dict[str, str]) -> None:
    """Refuse columns of a Parquet file that hold no single values."""
    for name, kind in kinds.items():
        if kind == "BOOLEAN" or kind.endswith("]") or kind.startswith(("STRUCT", "MAP", "UNION")):
            raise DataError(
                f"{path}: the column `{name}` is of type {kind}.",
                rule=_SINGLE,
                remedy="Write it as numbers, text or times.",
            )


def _check_json(connection: duckdb.DuckDBPyConnection, path: Path, columns: list[str]) -> None:
    """Refuse lines that are no JSON object, and columns that the first line does not have."""
    bad = connection.execute(
        "SELECT row_number, line FROM lines WHERE CASE WHEN json_valid(line) THEN json_type(line) <> 'OBJECT' ELSE true END "
        "ORDER BY row_number LIMIT 1"
    ).fetchall()
    for row_number, line in bad:
        raise DataError(
            f"{path}, line {row_number}: `{line[:80]}` is no JSON object.",
            rule="Each line of a jsonl file is one JSON object.",
            remedy="Correct or remove that line.",
        )
    first = connection.execute(
        "SELECT json_keys(line) FROM lines ORDER BY row_number LIMIT 1"
    ).fetchall()
    for name in columns if first else []:
        _column_index(path, name, list(first[0][0]))


def _check_json_types(
    connection: duckdb.DuckDBPyConnection,
    path: Path,
    columns: list[str],
    pointers: list[str],
    names: list[str],
) -> None:
    """Refuse values that are not single ones, and columns of ids that hold numbers and texts."""
    groups = connection.execute(
        f"SELECT json_type(line, [{', '.join(pointers)}]) AS kinds, min(row_number) FROM lines GROUP BY kinds ORDER BY 2"
    ).fetchall()
    seen: dict[str, tuple[str, int]] = {}
    for kinds, line in groups:
        for column, name, kind in zip(columns, names, kinds):
            if kind in ("ARRAY", "OBJECT", "BOOLEAN"):
                raise DataError(
                    f"{path}, line {line}: `{column}` is of type {kind.lower()}.",
                    rule=_SINGLE,
                    remedy="Correct or remove that line.",
                )
            if kind in (None, "NULL") or not name.endswith("_id"):
                continue
            what = "a text" if kind == "VARCHAR" else "a number"
            other, before = seen.setdefault(column, (what, line))
            if other != what:
                raise DataError(
                    f"{path}, line {line}: `{column}` is of mixed types: it is {what}, and {other} in line {before}.",
                    rule='An id is compared as text, so 7 and "7" would be the same one.',
                    remedy="Write the whole column in one way.",
                )


def _csv_reader(path: Path, format: str, num_columns: int, rejects: str) -> str:
    # Tab separated files have no quoting: a title may begin with a quotation mark.
    quoting = (
        "delim=',', quote='\"', escape='\"'"
        if format == "csv"
        else "delim='\t', quote='', escape=''"
    )
    columns = ", ".join(f"'c{index}': 'VARCHAR'" for index in range(num_columns))
    return f"read_csv({_path_literal(path)}, {quoting}, header=true, columns={{{columns}}}, {_csv_options(path, rejects)})"


def _csv_options(path: Path, rejects: str) -> str:
    compression = "gzip" if path.suffix.lower() == ".gz" else "none"
    return (
        f"auto_detect=false, compression='{compression}', max_line_size={_MAX_LINE_BYTES}, store_rejects=true, "
        f"rejects_table='{rejects}', rejects_scan='{rejects}_scan', rejects_limit={_MAX_REJECTS}"
    )


def _refuse_rejects(connection: duckdb.DuckDBPyConnection, path: Path, rejects: str) -> None:
    bad = connection.execute(
        f"SELECT line, csv_line, error_message FROM {rejects} ORDER BY line LIMIT 1"
    ).fetchall()
    for line, text, reason in bad:
        raise DataError(
            f"{path}, line {line}: `{str(text).strip()[:80]}` cannot be read: {str(reason).splitlines()[0].rstrip('.')}.",
            rule="Every row has as many fields as the file has columns, in UTF-8.",
            remedy="Correct or remove that line.",
        )
    connection.execute(f"DROP TABLE {rejects}; DROP TABLE {rejects}_scan")


def _column_index(path: Path, name: str, header: list[str]) -> int:
    """Where ``name`` is among the columns; RecBole's `name:type` counts as `name`."""
    if name in header:
        return header.index(name)
    bare = [column.partition(":")[0] for column in header]
    if name in bare:
        return bare.index(name)
    near = difflib.get_close_matches(name, header, n=1, cutoff=0.4)
    raise DataError(
        f"{path} has no column `{name}`; its columns are {', '.join(f'`{column}`' for column in header)}"
        + (f", the nearest is `{near[0]}`." if near else "."),
        remedy="Name it with user_column, item_column or time_column (for titles: titles_item_column, titles_title_column).",
    )


def _csv_header(path: Path, format: str) -> list[str]:
    try:
        with _open_text(path) as handle:
            header: list[str] | None = next(_csv_records(handle, format), None)
    except (OSError, EOFError, csv.Error) as error:
        raise unreadable(path, format, error) from None
    if not header:
        raise DataError(
            f"{path} holds no rows.",
            remedy="Give a file with a line of column names and at least one row.",
        )
    return header


def _csv_records(handle: TextIO, format: str) -> Any:
    if format == "csv":
        return csv.reader(handle)
    return csv.reader(handle, delimiter="\t", quoting=csv.QUOTE_NONE)


def _open_text(path: Path) -> TextIO:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", errors="replace", newline="")
    return path.open(encoding="utf-8-sig", errors="replace", newline="")


def where(path: Path, format: str, row_number: int) -> str:
    """`file, line N` of a row; only an error pays for the search, since blank and quoted line ends shift lines."""
    if (
        format == "sequences"
    ):  # a row is an item there, and a line has as many as it has fields behind the first
        with _open_text(path) as handle:
            ends = itertools.accumulate(
                max(0, len(re.split("[ \t]+", line.strip(" \t\r\n"))) - 1) for line in handle
            )
            return f"{path}, line {next(line for line, end in enumerate(ends, 1) if end >= row_number)}"
    if format not in ("csv", "tsv"):
        return f"{path}, {'row' if format == 'parquet' else 'line'} {row_number}"
    with _open_text(path) as handle:
        reader = _csv_records(handle, format)
        next(itertools.islice((record for record in reader if record), row_number, None), None)
        return f"{path}, line {reader.line_num}"


def unreadable(path: Path, format: str, error: Exception) -> DataError:
    """The error for a file that is not of its format at all."""
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return DataError(
        f"{path} cannot be read as {format}: {reason}.",
        remedy="Check the file, or name its true format.",
    )


def _path_literal(path: Path) -> str:
    # DuckDB takes a path as a pattern; a bracket expression makes each special character mean itself.
    return quote_text(
        "".join(f"[{character}]" if character in "*?[" else character for character in str(path))
    )


def one(
    connection: duckdb.DuckDBPyConnection, sql: str, parameters: list[Any] | None = None
) -> tuple[Any, ...]:
    """The single row that ``sql`` selects."""
    # fetchall, not fetchone: an unfinished result would block the connection for later streaming reads.
    row: tuple[Any, ...] = connection.execute(sql, parameters).fetchall()[0]
    return row
