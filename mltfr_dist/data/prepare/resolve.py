"""What the user typed -> the files to read, and the configuration completed from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mltfr_dist.config import PrepareConfig
from mltfr_dist.data.prepare.workspace import Workspace
from mltfr_dist.data.sources import read as sources
from mltfr_dist.data.sources.gather import Source, gather
from mltfr_dist.data.sources.inputs import given_file
from mltfr_dist.errors import ConfigError, DataError
from mltfr_dist.schema import changed


def resolve(
    given: Sequence[str],
    output: Path,
    config: PrepareConfig,
    packages_dir: str | Path | None,
    workspace: Workspace,
    frames: Mapping[str, object] = {},
) -> tuple[Source, PrepareConfig]:
    """The files to read, and the configuration with a named set's columns and titles filled in."""
    if len(given) == 1 and given[0] in sources.NAMED_SETS:
        return _named(given[0], config, packages_dir)
    try:
        return _gathered(given, output, config, workspace, frames)
    except (ConfigError, DataError):
        workspace.drop_fetched()
        raise


def _gathered(
    given: Sequence[str],
    output: Path,
    config: PrepareConfig,
    workspace: Workspace,
    frames: Mapping[str, object],
) -> tuple[Source, PrepareConfig]:
    """The files of ``given``, all of one format, and the configuration with that format."""
    source = gather(
        given,
        config.titles,
        format=config.format,
        partitions=config.partitions,
        output=output,
        copies=workspace.fetched,
        log=workspace.log,
        frames=frames,
    )
    formats = {sources.detect_format(file.as_input(), config.format) for file in source.files}
    if len(formats) > 1:
        raise DataError(
            f"{source.label} matches files of several formats: {', '.join(sorted(formats))}.",
            rule="All files of a source have one format.",
            remedy="Give a pattern that matches only the interactions.",
        )
    config = changed(config, {"format": formats.pop()}, source="the files")
    if not sources.has_time(config) and config.split == "global_temporal":
        raise DataError(
            f"{source.label} is read as {config.format}, which has no time.",
            rule="global_temporal cuts all users at two points in time.",
            remedy="Use `--split leave_one_out`, or a file with a time column.",
        )
    if config.format == "sequences" and len(source.files) > 1:
        raise DataError(
            f"{source.label} matches {len(source.files)} files of sequence text.",
            rule="Sequence text has one line a user, and so one file.",
            remedy="Join the files.",
        )
    if source.titles is not None:
        sources.detect_format(source.titles.as_input())
    return source, config


def _named(
    name: str, config: PrepareConfig, packages_dir: str | Path | None
) -> tuple[Source, PrepareConfig]:
    """A named set knows its files: a format or column set for another file would only break it."""
    named = sources.named_source(name, packages_dir)
    titles = named.titles if config.titles is None else config.titles
    columns = {
        key: value
        for key, value in named.columns.items()
        if config.titles is None or not key.startswith("titles_")
    }
    source = Source(
        named.interactions.name,
        (given_file(named.interactions, str(named.interactions)),),
        given_file(titles, str(titles)) if titles else None,
    )
    return source, changed(
        config, {"format": "tsv", "titles": titles, **columns}, source="the named set"
    )
