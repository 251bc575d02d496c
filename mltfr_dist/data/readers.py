"""Files of any supported format -> DuckDB tables of text columns, with every bad line named.

A file is read in file order and its rows are numbered, so that an error can say where it is.
"""

from __future__ import annotations

import csv
import difflib
import itertools
import re
from pathlib import Path
from typing import Any, TextIO

import duckdb

from mltfr_dist.data.inputs import InputFile
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
    file: InputFile,
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
            read_lines(connection, file, "lines")
            pointers = [
                quote_text("/" + name.replace("~", "~0").replace("/", "~1")) for name in columns
            ]
            _check_json(connection, file, columns)
            _check_json_types(connection, file, columns, pointers, names)
            fields = [
                f"{_constant(file, column) or f'line ->> {pointer}'} AS {name}"
                for column, pointer, name in zip(columns, pointers, names)
            ]
            connection.execute(
                f"CREATE TABLE {table} AS SELECT row_number, {', '.join(fields)} FROM lines ORDER BY row_number"
            )
            connection.execute("DROP TABLE lines")
            return
        if format == "parquet":
            reader = f"read_parquet({_path_literal(file.path)}, file_row_number=true, hive_partitioning=false)"
            described = connection.execute(
                f"DESCRIBE SELECT * FROM read_parquet({_path_literal(file.path)}, hive_partitioning=false)"
            ).fetchall()
            header = [str(row[0]) for row in described]
            _refuse_clash(file, header)
            fields = []
            for column, name in zip(columns, names):
                value = _constant(file, column)
                if value is None:
                    own, type = described[_column_index(file, column, header)][:2]
                    _refuse_types(file, {own: type})
                    kind = "BIGINT" if type in _INTEGERS else "VARCHAR"
                    value = f"CAST({quote_identifier(own)} AS {kind})"
                fields.append(f"{value} AS {name}")
            connection.execute(
                f"CREATE VIEW {table} AS SELECT file_row_number + 1 AS row_number, {', '.join(fields)} FROM {reader}"
            )
            return
        header, blank_lines = _csv_header(file, format)
        reader = _csv_reader(file, format, len(header), blank_lines, f"rejects_{table}")
        _refuse_clash(file, header)
        fields = [
            f"{_constant(file, name) or f'CAST(c{_column_index(file, name, header)} AS VARCHAR)'} AS {new}"
            for name, new in zip(columns, names)
        ]
        connection.execute(
            f"CREATE TABLE {table} AS SELECT row_number() OVER () AS row_number, {', '.join(fields)} FROM {reader}"
        )
    except duckdb.OutOfMemoryException:
        raise
    except duckdb.Error as error:
        raise unreadable(file, format, error) from None
    _refuse_rejects(connection, file, f"rejects_{table}")


def read_lines(connection: duckdb.DuckDBPyConnection, file: InputFile, table: str) -> None:
    """Create ``table(row_number, line)``: the lines of a text file that are not blank; row_number counts all from 1."""
    # The unit separator is no legal character of JSON and none of ids: a line that holds one is refused, not cut.
    options = "delim='\x1f', quote='', escape='', header=false, columns={'line': 'VARCHAR'}, "
    options += _csv_options("rejects_lines")
    connection.execute(
        f"CREATE TABLE {table} AS SELECT * FROM (SELECT row_number() OVER () AS row_number, line "
        f"FROM read_csv({_path_literal(file.path)}, {options})) WHERE NOT {EMPTY.format('line')}"
    )
    _refuse_rejects(connection, file, "rejects_lines")


def _constant(file: InputFile, column: str) -> str | None:
    """SQL of the value that a folder's name gives ``column``; None: the file itself has it."""
    value = file.partitions.get(column)
    return None if value is None else quote_text(value)


def _refuse_clash(file: InputFile, header: list[str]) -> None:
    """Refuse a column that both the file and the name of its folder give."""
    bare = {name.partition(":")[0] for name in header} | set(header)
    for name in file.partitions:
        if name in bare:
            raise DataError(
                f"{file.name} has a column `{name}`, and so has the name of its folder.",
                rule="With --partitions, a column comes from one of them.",
                remedy="Leave out --partitions, or rename the folders.",
            )


def _refuse_types(file: InputFile, kinds: dict[str, str]) -> None:
    """Refuse columns of a Parquet file that hold no single values."""
    for name, kind in kinds.items():
        if kind == "BOOLEAN" or kind.endswith("]") or kind.startswith(("STRUCT", "MAP", "UNION")):
            raise DataError(
                f"{file.name}: the column `{name}` is of type {kind}.",
                rule=_SINGLE,
                remedy="Write it as numbers, text or times.",
            )


def _check_json(connection: duckdb.DuckDBPyConnection, file: InputFile, columns: list[str]) -> None:
    """Refuse lines that are no JSON object, and columns that the first line does not have."""
    bad = connection.execute(
        "SELECT row_number, line FROM lines WHERE CASE WHEN json_valid(line) THEN json_type(line) <> 'OBJECT' ELSE true END "
        "ORDER BY row_number LIMIT 1"
    ).fetchall()
    for row_number, line in bad:
        raise DataError(
            f"{file.name}, line {row_number}: `{line[:80]}` is no JSON object.",
            rule="Each line of a jsonl file is one JSON object.",
            remedy="Correct or remove that line.",
        )
    first = connection.execute(
        "SELECT json_keys(line) FROM lines ORDER BY row_number LIMIT 1"
    ).fetchall()
    _refuse_clash(file, list(first[0][0]) if first else [])
    for name in columns if first else []:
        if name not in file.partitions:
            _column_index(file, name, list(first[0][0]))


def _check_json_types(
    connection: duckdb.DuckDBPyConnection,
    file: InputFile,
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
                    f"{file.name}, line {line}: `{column}` is of type {kind.lower()}.",
                    rule=_SINGLE,
                    remedy="Correct or remove that line.",
                )
            if kind in (None, "NULL") or not name.endswith("_id"):
                continue
            what = "a text" if kind == "VARCHAR" else "a number"
            other, before = seen.setdefault(column, (what, line))
            if other != what:
                raise DataError(
                    f"{file.name}, line {line}: `{column}` is of mixed types: it is {what}, and {other} in line {before}.",
                    rule='An id is compared as text, so 7 and "7" would be the same one.',
                    remedy="Write the whole column in one way.",
                )


def _csv_reader(
    file: InputFile, format: str, num_columns: int, blank_lines: int, rejects: str
) -> str:
    # Tab separated files have no quoting: a title may begin with a quotation mark.
    quoting = (
        "delim=',', quote='\"', escape='\"'"
        if format == "csv"
        else "delim='\t', quote='', escape=''"
    )
    columns = ", ".join(f"'c{index}': 'VARCHAR'" for index in range(num_columns))
    return (
        f"read_csv({_path_literal(file.path)}, {quoting}, header=true, skip={blank_lines}, "
        f"columns={{{columns}}}, {_csv_options(rejects)})"
    )


def _csv_options(rejects: str) -> str:
    return (
        f"auto_detect=false, compression='none', hive_partitioning=false, max_line_size={_MAX_LINE_BYTES}, store_rejects=true, "
        f"rejects_table='{rejects}', rejects_scan='{rejects}_scan', rejects_limit={_MAX_REJECTS}"
    )


def _refuse_rejects(connection: duckdb.DuckDBPyConnection, file: InputFile, rejects: str) -> None:
    bad = connection.execute(
        f"SELECT line, csv_line, error_message FROM {rejects} ORDER BY line LIMIT 1"
    ).fetchall()
    for line, text, reason in bad:
        raise DataError(
            f"{file.name}, line {line}: `{str(text).strip()[:80]}` cannot be read: {str(reason).splitlines()[0].rstrip('.')}.",
            rule="Every row has as many fields as the file has columns, in UTF-8.",
            remedy="Correct or remove that line.",
        )
    connection.execute(f"DROP TABLE {rejects}; DROP TABLE {rejects}_scan")


def _column_index(file: InputFile, name: str, header: list[str]) -> int:
    """Where ``name`` is among the columns; RecBole's `name:type` counts as `name`."""
    if name in header:
        return header.index(name)
    bare = [column.partition(":")[0] for column in header]
    if name in bare:
        return bare.index(name)
    near = difflib.get_close_matches(name, header, n=1, cutoff=0.4)
    raise DataError(
        f"{file.name} has no column `{name}`; its columns are {', '.join(f'`{column}`' for column in header)}"
        + (f", the nearest is `{near[0]}`." if near else "."),
        remedy="Name it with user_column, item_column or time_column (for titles: titles_item_column, titles_title_column).",
    )


def _csv_header(file: InputFile, format: str) -> tuple[list[str], int]:
    """The names of the columns, and the number of blank lines before them."""
    try:
        with _open_text(file.path) as handle:
            blank_lines, header = 0, None
            for header in _csv_records(handle, format):
                if not _is_blank(header):
                    break
                blank_lines, header = blank_lines + 1, None
    except (OSError, EOFError, csv.Error) as error:
        raise unreadable(file, format, error) from None
    if not header:
        raise DataError(
            f"{file.name} holds no rows.",
            remedy="Give a file with a line of column names and at least one row.",
        )
    return header, blank_lines


def _is_blank(record: list[str]) -> bool:
    return not any(field.strip() for field in record)


def _csv_records(handle: TextIO, format: str) -> Any:
    if format == "csv":
        return csv.reader(handle)
    return csv.reader(handle, delimiter="\t", quoting=csv.QUOTE_NONE)


def _open_text(path: Path) -> TextIO:
    return path.open(encoding="utf-8-sig", errors="replace", newline="")


def where(file: InputFile, format: str, row_number: int) -> str:
    """`file, line N` of a row; only an error pays for the search, since blank and quoted line ends shift lines."""
    if (
        format == "sequences"
    ):  # a row is an item there, and a line has as many as it has fields behind the first
        with _open_text(file.path) as handle:
            ends = itertools.accumulate(
                max(0, len(re.split("[ \t]+", line.strip(" \t\r\n"))) - 1) for line in handle
            )
            return f"{file.name}, line {next(line for line, end in enumerate(ends, 1) if end >= row_number)}"
    if format not in ("csv", "tsv"):
        return f"{file.name}, {'row' if format == 'parquet' else 'line'} {row_number}"
    with _open_text(file.path) as handle:
        reader = _csv_records(handle, format)
        from_header = itertools.dropwhile(_is_blank, reader)
        next(itertools.islice(filter(None, from_header), row_number, None), None)
        return f"{file.name}, line {reader.line_num}"


def unreadable(file: InputFile, format: str, error: Exception) -> DataError:
    """The error for a file that is not of its format at all."""
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return DataError(
        f"{file.name} cannot be read as {format}: {reason}.",
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
