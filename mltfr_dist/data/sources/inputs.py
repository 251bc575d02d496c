"""A file as the user has it and as it is read.

`find.py` finds the files of a source, `plain.py` makes files that can be read of them.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import unquote

from mltfr_dist.errors import DataError

STANDARD_INPUT = "-"
COMPRESSIONS = {
    ".gz": b"\x1f\x8b\x08",
    ".bz2": b"BZh",
    ".xz": b"\xfd7zXZ\x00",
    ".zst": b"\x28\xb5\x2f\xfd",
}
"""Endings of compressed files, and how such files begin."""
PARQUET_MAGIC, ZIP_MAGIC = b"PAR1", b"PK\x03\x04"
_ARCHIVES = (".tar", ".tgz", ".tbz", ".txz", ".7z", ".rar", ".lz4", ".lzo", ".z", ".snappy")
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"


@dataclass(frozen=True)
class InputFile:
    """A file as it is read."""

    path: Path
    """Plain, seekable and uncompressed."""
    name: str
    """What the user calls it: `logs/a.csv.gz`, `set.zip: ratings.csv`, `standard input`."""
    ending: str
    """Lower case, without that of a compression: `.csv`."""
    partitions: Mapping[str, str] = field(default_factory=dict)
    """Columns that the names of its folders give (`--partitions`), the same value in each row."""


class Content(NamedTuple):
    """Size and hash of what a file was made of."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Given:
    """A file as the user has it: perhaps compressed, perhaps a member of an archive."""

    path: Path
    name: str
    member: str | None = None
    """Name within the archive ``path``; None: the file itself."""
    compressions: tuple[str, ...] = ()
    """Of :data:`COMPRESSIONS`, the outer one first."""
    ending: str = ""
    partitions: Mapping[str, str] = field(default_factory=dict)
    content: Content | None = None
    """Of a frame that was written into this file; None: the file is what the user has."""

    def as_input(self, path: Path | None = None) -> InputFile:
        """The file that is read for this one: ``path``, or its own."""
        return InputFile(path or self.path, self.name, self.ending, self.partitions)


def given_file(path: Path, name: str, member: str | None = None) -> Given:
    """A file by its name.

    Raises:
        DataError: its ending is that of an archive that is not read.
    """
    stem, compressions = (member or name).lower(), []
    while (suffix := PurePosixPath(stem).suffix) in COMPRESSIONS:
        compressions.append(suffix)
        stem = stem[: -len(suffix)]
    if suffix in _ARCHIVES:
        raise DataError(
            f"{name} is an archive of a kind that is not read (`{suffix}`).",
            rule=f"Read are {', '.join(COMPRESSIONS)} and .zip.",
            remedy="Unpack it first, and give the file of interactions.",
        )
    return Given(path, name, member, tuple(compressions), suffix)


def is_stream(source: str) -> bool:
    """Whether ``source`` can be read only once: standard input, a FIFO, a socket or a device."""
    if source == STANDARD_INPUT:
        return True
    try:
        mode = Path(source).stat().st_mode
    except (OSError, ValueError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode) or stat.S_ISSOCK(mode)


def refuse_twice(files: Sequence[Given]) -> None:
    """Refuse a file that is among the sources twice: its rows would count twice.

    Raises:
        DataError: naming it.
    """
    seen: dict[tuple[str, str | None], str] = {}
    for file in files:
        key = (os.path.realpath(file.path), file.member)
        if key in seen:
            also = f", also as {seen[key]}" if seen[key] != file.name else ""
            raise DataError(
                f"{file.name} is given twice{also}.",
                rule="Each row of a source counts once.",
                remedy="Name each file once.",
            )
        seen[key] = file.name


def with_partitions(files: Sequence[Given]) -> list[Given]:
    """The files with the columns that folder names `key=value` give (`--partitions`).

    Raises:
        DataError: no folder is named so, or not all files have the same keys.
    """
    of_files = [_partitions(file) for file in files]
    for file, partitions in zip(files, of_files):
        if not partitions:
            raise DataError(
                f"No folder in the path {file.name} is named `key=value`.",
                rule="--partitions makes columns of such folder names.",
                remedy="Leave out --partitions, or give the folder above such ones.",
            )
        if set(partitions) != set(of_files[0]):
            raise DataError(
                f"{file.name} lies in folders of the keys {', '.join(partitions)}, but "
                f"{files[0].name} in folders of {', '.join(of_files[0])}.",
                rule="With --partitions, all files have the same columns from folder names.",
                remedy="Prepare folders of one layout, or leave out --partitions.",
            )
    return [replace(file, partitions=partitions) for file, partitions in zip(files, of_files)]


def partition_keys(files: Iterable[Given]) -> list[str]:
    """The keys of folder names `key=value` in the paths of ``files``."""
    return list(dict.fromkeys(key for file in files for key, _ in _pairs(file)))


def _pairs(file: Given) -> list[tuple[str, str]]:
    folders = (file.member or file.name).split("/")[:-1]
    matches = (re.fullmatch(r"([^=]+)=(.*)", folder) for folder in folders)
    return [(unquote(match[1]), unquote(match[2])) for match in matches if match]


def _partitions(file: Given) -> dict[str, str]:
    pairs = _pairs(file)
    for key, _ in pairs:
        if [other for other, _ in pairs].count(key) > 1:
            raise DataError(
                f"{file.name} lies in two folders of the key `{key}`.",
                rule="With --partitions, a folder name `key=value` makes a column.",
                remedy="Rename one of them, or leave out --partitions.",
            )
    return {key: "" if value == _NULL_PARTITION else value for key, value in pairs}
