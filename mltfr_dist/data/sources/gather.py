"""What the user typed -> the files of one preparation, and the manifest's record of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mltfr_dist.data.shards.manifest import SourceInfo
from mltfr_dist.data.sources import remote
from mltfr_dist.data.sources.find import files_in, find_files
from mltfr_dist.data.sources.frames import write_frame
from mltfr_dist.data.sources.identity import Identity, identify
from mltfr_dist.data.sources.inputs import (
    STANDARD_INPUT,
    Content,
    Given,
    InputFile,
    is_stream,
    partition_keys,
    refuse_twice,
    with_partitions,
)
from mltfr_dist.data.sources.plain import plain_files, spool_stream
from mltfr_dist.errors import DataError

Log = Callable[[str], None]


@dataclass(frozen=True)
class Source:
    """The files of one preparation, as the user has them."""

    label: str
    """What the manifest calls them."""
    files: tuple[Given, ...]
    titles: Given | None

    @cached_property
    def identities(self) -> dict[Path, Identity]:
        """Of each file, read through once.

        Raises:
            DataError: one cannot be read.
        """
        given = (*self.files, *([self.titles] if self.titles else []))
        paths = {file.path: file.name for file in given}
        return {path: identify(path, name) for path, name in paths.items()}

    def info(self) -> SourceInfo:
        """Sizes and hashes of the files as given (compressed, if they are), and of frames."""
        contents = list({file.path: self._content(file) for file in self.files}.values())
        # What folder names give is data, too, and so are the members that were chosen.
        more = [f"{key}={value}" for file in self.files for key, value in file.partitions.items()]
        more += [file.member for file in self.files if file.member is not None]
        hashes = [*(content.sha256 for content in contents), *more]
        titles = self.titles
        return SourceInfo(
            file=self.label,
            bytes=sum(content.bytes for content in contents),
            sha256=hashes[0] if len(hashes) == 1 else _joint_hash(hashes),
            titles_file=Path(titles.name).name if titles else None,
            titles_sha256=self._content(titles).sha256 if titles else None,
        )

    def _content(self, file: Given) -> Content:
        identity = self.identities[file.path]
        return file.content or Content(identity.bytes, identity.sha256)

    @contextmanager
    def plain(
        self, folder: Path, format: str, log: Log
    ) -> Iterator[tuple[list[InputFile], InputFile | None]]:
        """The files to read rows from, and the one of titles; see :func:`plain_files`.

        Raises:
            DataError: as plain_files, or a file was changed since its hash was taken.
        """
        given = [*self.files, *([self.titles] if self.titles else [])]
        marks = [self.identities[file.path].marks for file in given]
        with plain_files(given, marks, folder, log, is_sequences=format == "sequences") as files:
            count = len(self.files)
            yield files[:count], files[count] if self.titles else None
        for file in given:
            if not self.identities[file.path].still_holds(file.path):
                raise DataError(
                    f"{file.name} was changed while it was read.",
                    rule="The manifest's hash must be that of the rows that were read.",
                    remedy="Start the same command again once nothing writes into it.",
                )


def _joint_hash(hashes: Sequence[str]) -> str:
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def gather(
    sources: Sequence[str],
    titles: Path | None,
    *,
    format: str = "auto",
    partitions: bool = False,
    output: Path,
    copies: Path,
    log: Log,
    frames: Mapping[str, object] = {},
) -> Source:
    """Find all files of ``sources``; what is elsewhere, or can be read once only, is copied.

    Args:
        sources: paths, folders, patterns, zip files, URLs, FIFOs, or `-`, in the order of rows.
        titles: file of item titles.
        format: as the user named it, or `auto`.
        partitions: whether folder names `key=value` are columns.
        output: where prepared data goes.
        copies: folder for copies of URLs, streams and frames.
        log: told of what is left out or decided.
        frames: the tables in memory among ``sources`` and ``titles``, by their names there.

    Raises:
        DataError: nothing is there, a file is there twice, or it cannot be read.
    """
    wanted = [*sources, *([str(titles)] if titles else [])]
    streams = _streams(wanted, frames)
    given_by_source: dict[str, list[Given]] = {}
    for source in wanted:
        if source in frames:
            given_by_source[source] = [write_frame(frames[source], source, copies)]
        elif remote.is_url(source):
            copied = remote.fetch(source, copies)
            given_by_source[source] = [
                given for path, name in copied for given in files_in(path, name)
            ]
        elif source not in streams:
            given_by_source[source] = find_files(source, output, log)
    for source in streams:  # last: nothing else can be wrong then
        named = "auto" if titles and source == str(titles) else format
        given_by_source[source] = [spool_stream(source, named, copies, log)]
    files = [file for source in sources for file in given_by_source[source]]
    refuse_twice(files)
    if partitions:
        files = with_partitions(files)
    elif keys := partition_keys(files):
        log(f"Names of folders ({keys[0]}=...) are no columns; --partitions makes them columns.")
    titled = given_by_source[str(titles)] if titles else []
    if len(titled) > 1:
        raise DataError(
            f"{titles} holds {len(titled)} files.", remedy="Give the one with the titles."
        )
    return Source(_label(sources), tuple(files), titled[0] if titled else None)


def _streams(wanted: Sequence[str], frames: Mapping[str, object]) -> list[str]:
    """Those of ``wanted`` that can be read only once, after a look at all names."""
    if not all(source.strip() for source in wanted):
        raise DataError(
            "The name of a source is empty.",
            rule="An empty name would mean the folder you are in.",
            remedy="Name the source; `.` is this folder.",
        )
    streams = [source for source in wanted if source not in frames and is_stream(source)]
    for source in streams:
        if streams.count(source) > 1:
            raise DataError(
                f"{source} is given twice, and can be read only once.",
                remedy="Give each source once.",
            )
    return streams


def _label(sources: Sequence[str]) -> str:
    names = [
        "standard input" if source == STANDARD_INPUT else source.rstrip("/").rpartition("/")[2]
        for source in sources
    ]
    return ", ".join(names) if len(names) < 4 else f"{names[0]} ... {names[-1]} ({len(names)})"
