"""What the readers of all formats share: scans, lines, bad lines named, and SQL's quoting."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

import duckdb

from mltfr_dist.data.sources.inputs import InputFile
from mltfr_dist.errors import DataError

EMPTY = "({0} IS NULL OR trim(CAST({0} AS VARCHAR)) = '')"
"""SQL condition on the column {0}."""
SINGLE = "A user, an item and a time are single values: a number, a text or a date."
_MAX_LINE_BYTES = 64_000_000
_MAX_REJECTS = 1000


class NoRowsError(DataError):
    """A file without any row: an error, unless other files of the source have rows."""


@dataclass(frozen=True)
class Scan:
    """A file that is ready to be read.

    Attributes:
        sql: SELECT of ``row_number`` (1.. in file order) and the wanted columns, as text, but for
            whole numbers and moments of Parquet.
        names: what the user calls these columns.
        where: from a row number to `file, line N`; only an error pays for the search.
        finish: called after each reading: refuses bad lines.
        close: called at the end: drops tables.
        time_kind: how times come (see times.py); `text` is still to be understood.
        kinds: of each column: its kind, and where that was seen; files must not differ in it.
    """

    sql: str
    names: list[str]
    where: Callable[[int], str]
    finish: Callable[[], None] = lambda: None
    close: Callable[[], None] = lambda: None
    time_kind: str = "text"
    kinds: dict[str, tuple[str, str]] = field(default_factory=dict)


def quote_identifier(name: str) -> str:
    """``name`` as an SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def quote_text(value: str) -> str:
    """``value`` as an SQL string literal."""
    return "'" + value.replace("'", "''") + "'"


def value_sql(expression: str, null: tuple[str, ...]) -> str:
    """``expression``, or NULL where its text is one of ``null``."""
    if not null:
        return expression
    texts = ", ".join(map(quote_text, null))
    return f"CASE WHEN CAST({expression} AS VARCHAR) NOT IN ({texts}) THEN {expression} END"


def constants(file: InputFile, header: list[str]) -> dict[str, str]:
    """SQL of the columns that the file's folders give, which none of its own in ``header`` is.

    Raises:
        DataError: the file has such a column, too.
    """
    bare = {name.partition(":")[0] for name in header} | set(header)
    for name in file.partitions:
        if name in bare:
            raise DataError(
                f"{file.name} has a column `{name}`, and so has the name of its folder.",
                rule="With --partitions, a column comes from one of them.",
                remedy="Leave out --partitions, or rename the folders.",
            )
    return {name: quote_text(value) for name, value in file.partitions.items()}


def path_literal(file: InputFile) -> str:
    """The path as SQL; to DuckDB it is a pattern, in which brackets keep special characters."""
    text = str(file.path)
    return quote_text("".join(f"[{char}]" if char in "*?[" else char for char in text))


def csv_options(rejects: str) -> str:
    """What every reading of delimited text has in common; bad lines go to the table ``rejects``."""
    return (
        f"auto_detect=false, compression='none', max_line_size={_MAX_LINE_BYTES}, "
        f"store_rejects=true, rejects_table='{rejects}', rejects_scan='{rejects}_scan', "
        f"rejects_limit={_MAX_REJECTS}, hive_partitioning=false"
    )


def refuse_rejects(connection: duckdb.DuckDBPyConnection, file: InputFile, rejects: str) -> None:
    """Refuse the first line that could not be read; else drop the table of bad lines."""
    bad = connection.execute(
        f"SELECT line, csv_line, error_message FROM {rejects} ORDER BY line LIMIT 1"
    ).fetchall()
    for line, text, reason in bad:
        raise DataError(
            f"{file.name}, line {line}: `{str(text).strip()[:80]}` cannot be read: "
            f"{str(reason).splitlines()[0].rstrip('.')}.",
            rule="Every row has as many fields as the file has columns, in UTF-8 (or --encoding).",
            remedy="Correct or remove that line.",
        )
    connection.execute(f"DROP TABLE {rejects}; DROP TABLE {rejects}_scan")


def read_lines(connection: duckdb.DuckDBPyConnection, file: InputFile) -> None:
    """Create ``lines(row_number, line)`` of lines that are not blank; row_number counts all."""
    # The unit separator is no legal character of JSON and none of ids: a line that holds one is
    # refused, not cut.
    with reading(file, "text"):
        connection.execute(
            "CREATE OR REPLACE TABLE lines AS SELECT * FROM (SELECT row_number() OVER () AS "
            f"row_number, line FROM read_csv({path_literal(file)}, delim='\x1f', quote='', "
            f"escape='', header=false, columns={{'line': 'VARCHAR'}}, "
            f"{csv_options('rejects_lines')})) WHERE NOT {EMPTY.format('line')}"
        )
    refuse_rejects(connection, file, "rejects_lines")


def open_text(file: InputFile, encoding: str = "utf-8") -> TextIO:
    """The file as text, without a byte order mark; bytes that are no text are replaced."""
    encoding = "utf-8-sig" if encoding == "utf-8" else encoding
    return file.path.open(encoding=encoding, errors="replace", newline="")


@contextmanager
def reading(file: InputFile, format: str) -> Iterator[None]:
    """Turn DuckDB's errors into one that names the file; those of memory and disk stay."""
    try:
        yield
    except duckdb.OutOfMemoryException:
        raise
    except duckdb.Error as error:
        if isinstance(error, duckdb.IOException) and "write" in str(error).lower():
            raise  # the disk is full
        raise unreadable(file, format, error) from None


def unreadable(file: InputFile, format: str, error: Exception) -> DataError:
    """The error for a file that is not of its format at all."""
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    return DataError(
        f"{file.name} cannot be read as {format}: {reason}.",
        remedy="Check the file, or name its true format with --format.",
    )


def no_rows(file: InputFile) -> NoRowsError:
    """The error for a file without rows."""
    return NoRowsError(
        f"{file.name} holds no rows.", remedy="Give a file with at least one interaction."
    )


def one(
    connection: duckdb.DuckDBPyConnection, sql: str, parameters: list[Any] | None = None
) -> tuple[Any, ...]:
    """The single row that ``sql`` selects."""
    # fetchall, not fetchone: an unfinished result would block the connection for streaming reads.
    row: tuple[Any, ...] = connection.execute(sql, parameters).fetchall()[0]
    return row
