"""Full disks and places that cannot be written: said at the start where it can be known."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import duckdb

from mltfr_dist.errors import DataError

_FULL = (errno.ENOSPC, errno.EDQUOT)
# DuckDB spills at most 90% of what is free, and then names the setting that says so.
_FULL_TEXTS = (*(os.strerror(number) for number in _FULL), "max_temp_directory_size")
_LEAST_SHARE, _USUAL_SHARE = 0.1, 3.0
"""Disk that a preparation takes, in sizes of its source: at least the first, often the second."""


class DiskError(DataError):
    """The disk is at fault, not the input: what was done stays, and the same command goes on."""


def is_full(error: BaseException | None) -> bool:
    """Whether a full disk (or quota) is behind an error, whatever it was turned into on its way."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if isinstance(error, duckdb.Error | OSError) and any(
            text in str(error) for text in _FULL_TEXTS
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def disk_errors(folders: Sequence[Path]) -> Iterator[None]:
    """Turn what the operating system refuses into one paragraph.

    Args:
        folders: folders that are written to; they need not exist.

    Raises:
        DiskError: the disk is full, or a file cannot be read or written.
    """
    try:
        yield
    except BrokenPipeError:  # of whoever reads our output: no matter of files
        raise
    except (OSError, duckdb.Error, DataError) as error:
        if is_full(error) and not isinstance(error, DiskError):
            free = {folder: free_bytes(folder) for folder in folders}
            folder = min(free, key=lambda folder: free[folder])
            raise DiskError(
                f"The disk is full: {megabytes(free[folder])} are free now for {folder}.",
                rule="What was done so far is kept there, and nothing that is half written counts.",
                remedy="Free some room and start the same command again: "
                "it goes on where it stopped.",
            ) from None
        if isinstance(error, OSError):
            raise DiskError(
                f"{error.filename or folders[0]}: {error.strerror or error}.",
                rule="The source must be readable, and the output and --temp-dir writable.",
                remedy="Put that right and start the same command again: "
                "it goes on where it stopped.",
            ) from None
        raise


def check_writable(folder: Path, given: str) -> None:
    """Whether ``folder`` can be made and written into; leaves nothing behind.

    Args:
        folder: it, or any folders above it, need not exist.
        given: what the user calls it, such as `--temp-dir DIR`.

    Raises:
        DiskError: it cannot.
    """
    base = _existing(folder.parent)
    remedy = f"Give another place than {given}, or make it one that you may write to."
    if not base.is_dir():
        raise DiskError(
            f"{given} cannot be written: {base} is not a folder.",
            rule="What lies above an output or a --temp-dir must be a folder.",
            remedy=remedy,
        )
    try:
        with tempfile.TemporaryDirectory(dir=base, prefix=".mltfr-") as probe:
            (Path(probe) / folder.name).mkdir()
            (Path(probe) / "file").write_bytes(b"\0")
    except OSError as error:
        if error.errno in _FULL:
            raise  # disk_errors says how full
        raise DiskError(
            f"{given} cannot be written: {base}: {error.strerror}.",
            rule="Preparation needs a place where it can make folders and files.",
            remedy=remedy,
        ) from None


def check_space(folder: Path, source_bytes: int, log: Callable[[str], None]) -> None:
    """Compare the free disk at ``folder`` with a rough need.

    Raises:
        DiskError: there is too little, whatever the data is like.
    """
    free = free_bytes(folder)
    need = f"{megabytes(free)} are free for {folder}, and the source has {megabytes(source_bytes)}"
    if free < _LEAST_SHARE * source_bytes:
        raise DiskError(
            f"The disk is too small: {need}.",
            rule="A preparation often takes three times its source's size there, never less "
            "than a tenth.",
            remedy="Free some room, or name a folder on another disk with --temp-dir.",
        )
    if free < _USUAL_SHARE * source_bytes:
        log(f"The disk may not suffice: {need}; often three times that is needed.")


def free_bytes(folder: Path) -> int:
    """Free bytes where ``folder`` lies, or would lie; no limit where the file system tells none."""
    usage = shutil.disk_usage(_existing(folder))
    return usage.free if usage.total else sys.maxsize


def megabytes(size: int) -> str:
    """Bytes as MB."""
    return f"{size / 1e6:,.1f} MB"


def _existing(path: Path) -> Path:
    """The nearest of ``path`` and the folders above it that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())
