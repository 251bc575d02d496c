"""The inputs of a run: interactions to shards, language models to token tables."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from mltfr_dist.config import PrepareConfig, PrepareResources, TableConfig
from mltfr_dist.data.sources.fetch import known_set
from mltfr_dist.data.sources.frames import is_frame
from mltfr_dist.data.sources.public_sets import SETS
from mltfr_dist.errors import ConfigError
from mltfr_dist.library.words import as_call, path_text, words_of_a_call
from mltfr_dist.progress import say
from mltfr_dist.schema import Section, or_nearest, validate
from mltfr_dist.tables.info import TableInfo

if TYPE_CHECKING:  # imports torch
    from mltfr_dist.data.shards.manifest import Manifest

Log = Callable[[str], None]
FRAME, TITLES_FRAME = "DataFrame", "DataFrame of titles"
"""What messages and the manifest call a table in memory."""


def prepare(
    source: object,
    output: str | os.PathLike[str],
    *,
    titles: object = None,
    download: bool = False,
    packages: str | os.PathLike[str] | None = None,
    log: Log = say,
    **options: Any,
) -> Manifest:
    """Interactions to shards, as `mltfr prepare` does: complete, or not there at all.

    A table in memory goes through the steps of a Parquet file with the same columns, and gives the
    same bytes. The same call again verifies what is there and uses it; another source, or other
    options, are refused.

    Args:
        source: A table in memory (pandas, polars, Arrow, or anything that has
            `__arrow_c_stream__` or `__dataframe__`), or what the command takes: a path, folder,
            pattern, URL, the name of a public set, or a list of these.
        output: Folder to write, or its URL.
        titles: Titles of items: a table in memory with columns `item_id` and `title`, or a file.
        download: Whether a public set may be fetched, into `data/sets`.
        packages: Folder of unpacked packages that hold a named set.
        log: Takes each line of the report.
        **options: Fields of :class:`mltfr_dist.config.PrepareConfig` and
            :class:`mltfr_dist.config.PrepareResources`, such as ``user_column="user"``;
            `mltfr prepare --help` lists them.

    Returns:
        The manifest: counts, splits, hashes.

    Raises:
        ConfigError: An option that does not exist, or does not fit.
        DataError: The source or the output cannot be used, or nothing is left to train on.
    """
    from mltfr_dist.data.prepare.run import prepare as prepare_source

    def told(line: str) -> None:
        log(as_call(line))

    with words_of_a_call():
        frames: dict[str, object] = {}
        sources = _names(source, frames)
        config, resources = _prepare_options(options, titles, frames)
        if FRAME not in frames:
            sources, config = known_set(sources, config, download=download, folder=SETS, log=told)
        elif download:
            raise ConfigError("--download is given for a table in memory.", remedy="Leave it out.")
        return prepare_source(
            sources,
            path_text(output, "output"),
            config,
            resources=resources,
            packages_dir=None if packages is None else path_text(packages, "packages"),
            frames=frames,
            log=told,
        )


def _prepare_options(
    options: dict[str, Any], titles: object, frames: dict[str, object]
) -> tuple[PrepareConfig, PrepareResources]:
    """The options of a call; titles that are a table in memory go into ``frames``.

    Raises:
        ConfigError: One does not exist, is not valid, or has no use for a table in memory.
    """
    _check_names(options, PrepareConfig, PrepareResources)
    values = {name: value for name, value in options.items() if name in PrepareConfig.model_fields}
    limits = {name: value for name, value in options.items() if name not in values}
    if titles is not None:
        values["titles"] = _titles_name(titles, frames)
    config = validate(PrepareConfig, values, source="the call of prepare")
    if FRAME in frames and config.format not in ("auto", "parquet", "parquet-lists"):
        raise ConfigError(
            f"--format {config.format} is given for a table in memory.",
            rule="A table in memory is read as Parquet is.",
            remedy="Leave it out; or, for one row a user with lists, --format parquet-lists.",
        )
    return config, validate(PrepareResources, limits, source="the call of prepare")


def build_table(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] = "data/tables",
    *,
    name: str | None = None,
    packages: str | os.PathLike[str] | None = None,
    log: Log = say,
    **options: Any,
) -> TableInfo:
    """A language model's input embeddings to a token table, as `mltfr tables` does.

    Args:
        source: Safetensors or GGUF file, checkpoint folder, hub id, or a demo table's name.
        output: Folder of tables; the table becomes ``output/name``.
        name: The table's name; None: the source's.
        packages: Folder of unpacked packages that hold a demo table.
        log: Takes each line of the report.
        **options: Fields of :class:`mltfr_dist.config.TableConfig`, such as
            ``normalise="whiten"``; `mltfr tables --help` lists them.

    Returns:
        What was stored: name, rows, dimension, provenance, hashes.

    Raises:
        ConfigError: An option that does not exist, or a name that no table can have.
        DataError: A source that cannot be read with certainty, or another table of this name.
    """
    from mltfr_dist.tables.build import build_tables  # imports torch

    with words_of_a_call():
        _check_names(options, TableConfig)
        (info,) = build_tables(
            [path_text(source, "source")],
            path_text(output, "output"),
            validate(TableConfig, options, source="the call of build_table"),
            name=name,
            packages=None if packages is None else path_text(packages, "packages"),
            log=lambda line: log(as_call(line)),
        )
    return info


def _names(source: object, frames: dict[str, object]) -> Sequence[str]:
    """The names of the sources; a table in memory goes into ``frames``, under its name.

    Raises:
        ConfigError: It is neither a name, nor a list of names, nor a table.
    """
    if is_frame(source):
        frames[FRAME] = source
        return [FRAME]
    if isinstance(source, str | os.PathLike):
        return [os.fspath(source)]
    many = list(source) if isinstance(source, Iterable) and not isinstance(source, bytes) else []
    if not many or not all(isinstance(name, str | os.PathLike) for name in many):
        raise ConfigError(
            f"source is of type {type(source).__name__}.",
            rule="A source is a path, a name, a list of these, or one table in memory that has "
            "`__arrow_c_stream__` or `__dataframe__`, as those of pandas, polars and Arrow have.",
            remedy="Make a table of it, as with `pyarrow.table(source)`; or join several tables.",
        )
    return [os.fspath(name) for name in many]


def _titles_name(titles: object, frames: dict[str, object]) -> str:
    if not is_frame(titles):
        return path_text(titles, "titles")
    frames[TITLES_FRAME] = titles
    return TITLES_FRAME


def _check_names(options: dict[str, Any], *sections: type[Section]) -> None:
    """Refuse an option that does not exist.

    Raises:
        ConfigError: Naming the nearest.
    """
    valid = [name for section in sections for name in section.model_fields]
    for name in options:
        if name not in valid:
            raise ConfigError(
                f"There is no option `{name}`{or_nearest(name, valid)}.",
                remedy=f"Options: {', '.join(valid)}.",
            )
