"""From a format's name and the options to a layout, and from a file to the format it looks like."""

from __future__ import annotations

import dataclasses
import re

import pyarrow as pa
import pyarrow.parquet as pq

from mltfr_dist.config import PrepareConfig
from mltfr_dist.data.sources.formats import FORMATS, GENERAL, NAMED, Format
from mltfr_dist.data.sources.inputs import InputFile
from mltfr_dist.errors import ConfigError, DataError
from mltfr_dist.schema import or_nearest

_HEAD_BYTES = 262_144
_HEAD_LINES = 20
_TEXT_OPTIONS = ("header", "delimiter", "quote", "encoding", "skip_rows")
_COLUMN_OPTIONS = ("user_column", "item_column", "time_column")
_NO_COLUMNS = ("sequences", "pairs", "mind", "netflix")
"""Formats whose lines have no columns to choose."""


def option(field: str) -> str:
    """A field of :class:`PrepareConfig` as it is typed."""
    return "--no-header" if field == "header" else "--" + field.replace("_", "-")


def format_help() -> str:
    """What `--format help` prints."""
    width = max(map(len, FORMATS))

    def lines(formats: dict[str, Format]) -> str:
        return "\n".join(f"  {name:<{width}}  {formats[name].title}" for name in formats)

    return (
        f"By ending, or by name with --format:\n{lines(GENERAL)}\n\n"
        f"By name alone:\n{lines(NAMED)}\n\n"
        "What has no name here is read as csv, tsv or jsonl with --no-header, --delimiter,\n"
        "--quote, --encoding, --skip-rows, --time-format, --null, --missing and --order.\n"
    )


def layout(name: str, config: PrepareConfig) -> Format:
    """The format ``name``, with what the configuration says about columns, text and times.

    Raises:
        ConfigError: an option that the format has no use for, or contradicts.
    """
    base, fields = FORMATS[name], PrepareConfig.model_fields
    given = {
        key: getattr(config, key)
        for key in (*_TEXT_OPTIONS, *_COLUMN_OPTIONS, "time_format", "missing")
        if key in config.model_fields_set
        and (key in _COLUMN_OPTIONS or getattr(config, key) != fields[key].default)
    }
    allowed = ["missing"]
    if name in GENERAL and base.reader == "delimited":
        allowed += _TEXT_OPTIONS
    if name not in _NO_COLUMNS:
        allowed += _COLUMN_OPTIONS[:2]
        allowed += ["time_column"] if base.time and config.order == "time" else []
    if base.time and config.order == "time" and name in (*GENERAL, "parquet-lists"):
        allowed.append("time_format")
    refused = [option(key) for key in given if key not in allowed]
    if refused:
        without_time = " with --order file" if base.time and config.order == "file" else ""
        raise ConfigError(
            f"{', '.join(refused)}: the format {name}{without_time} has no use for this.",
            rule=f"{name} is: {base.title}.",
            remedy="Leave it out, or name another format (`mltfr prepare --format help`).",
        )
    values = {key.removesuffix("_column"): value for key, value in given.items()}
    if len(values.get("delimiter", "")) > 1 and values.setdefault("quote", ""):
        raise ConfigError(
            f"--delimiter '{config.delimiter}' and --quote '{config.quote}' do not go together.",
            rule="With a delimiter of several characters there is no quoting.",
            remedy="Leave --quote out.",
        )
    if "missing" in config.model_fields_set:
        values["missing"] = config.missing
    if config.order == "file":
        values["time"] = None
    return dataclasses.replace(base, null=config.null, **values)


def check_name(name: str) -> None:
    """Refuse a name that is no format.

    Raises:
        ConfigError: with the nearest name.
    """
    if name == "auto" or name in FORMATS:
        return
    raise ConfigError(
        f"There is no format `{name}`{or_nearest(name, FORMATS)}.",
        remedy="`mltfr prepare --format help` lists the formats.",
    )


def recognise(file: InputFile) -> str | None:
    """The named format that the beginning of a file looks like, if there is one."""
    if file.ending in (".parquet", ".pq"):
        try:
            schema = pq.read_schema(file.path)
        except (OSError, pa.ArrowException):
            return None
        return "parquet-lists" if any(pa.types.is_list(kind) for kind in schema.types) else None
    lines = head(file)
    names = (name for name in NAMED if lines and _looks_like(NAMED[name], lines))
    return next(names, None)


def head(file: InputFile) -> list[str]:
    """The first lines of a text file that are not blank."""
    with file.path.open("rb") as handle:
        content = handle.read(_HEAD_BYTES)
    lines = content.decode("utf-8-sig", errors="replace").splitlines()
    if len(content) == _HEAD_BYTES and len(lines) > 1:
        lines.pop()  # cut off
    return [line for line in lines if line.strip()][:_HEAD_LINES]


def _looks_like(format: Format, lines: list[str]) -> bool:
    if format.looks is None:
        return False
    has_rows_alone = format.reader == "lists" or (
        format.reader == "delimited" and not format.header
    )
    return all(re.fullmatch(format.looks, line) for line in lines[: None if has_rows_alone else 1])


def with_hint(error: DataError, file: InputFile, name: str) -> DataError:
    """``error`` of reading ``file`` as ``name``, with a remedy that names what it looks like."""
    looks = recognise(file)
    if looks in (None, name) or f"--format {looks}" in error.remedy:
        return error
    return DataError(
        error.what,
        rule=error.rule,
        remedy=f"{error.remedy} The file looks like {looks} ({FORMATS[str(looks)].title}): "
        f"try --format {looks}.",
    )


def refuse_other_format(file: InputFile, name: str) -> None:
    """Refuse a file that does not look like the named format ``name``, but like another.

    Raises:
        DataError: naming both.
    """
    own = NAMED[name]
    if own.looks is None or own.reader == "parquet":
        return
    lines = head(file)
    other = next((n for n in NAMED if n != "pairs" and _looks_like(NAMED[n], lines)), None)
    if lines and other not in (None, name) and not _looks_like(own, lines):
        raise DataError(
            f"{file.name} does not look like {name} ({own.title}), but like {other} "
            f"({NAMED[str(other)].title}).",
            rule="Read by another format's columns, users, items and times would be mixed up.",
            remedy=f"Use --format {other}, or --format csv, tsv or jsonl and name the columns.",
        )
