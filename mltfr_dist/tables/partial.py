"""The folder in which a table is written, and what killed extractions left of such folders."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from mltfr_dist.tables.row_file import writing


@contextmanager
def partial_folder(output: Path, name: str, log: Callable[[str], None]) -> Iterator[Path]:
    """``output/.NAME.partial-HOST-PID``, which is gone afterwards unless it was renamed.

    Leftovers of the same name are removed first, if the process that made them is gone.

    Raises:
        DataError: ``output`` cannot be written.
    """
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
        for left in _leftovers(output, name):
            shutil.rmtree(left, ignore_errors=True)
            log(f"Removed {left}, which an interrupted extraction left.")
        folder = output / f".{name}.partial-{socket.gethostname()}-{os.getpid()}"
        folder.mkdir()
        lock = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks: host and process remain
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder
    finally:
        os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)


def _leftovers(output: Path, name: str) -> list[Path]:
    """Partial folders of ``name`` that nobody works in; one without a host counts as this one's."""
    pattern = re.compile(rf"\.{re.escape(name)}\.partial-(?:(?P<host>.+)-)?(?P<pid>\d+)")
    leftovers = []
    for folder in output.iterdir():
        if (match := pattern.fullmatch(folder.name)) and match["host"] in (
            None,
            socket.gethostname(),
        ):
            pid = int(match["pid"])
            if (pid == os.getpid() or not _is_maker(pid, folder)) and not _is_locked(folder):
                leftovers.append(folder)
    return leftovers


def _is_maker(pid: int, folder: Path) -> bool:
    """Whether process ``pid`` lives and is old enough to have made ``folder``."""
    try:
        process = psutil.Process(pid)
        began = process.create_time()
        return process.status() != psutil.STATUS_ZOMBIE and began <= folder.stat().st_mtime
    except (psutil.NoSuchProcess, OverflowError):
        return False
    except psutil.AccessDenied:
        return True


def _is_locked(folder: Path) -> bool:
    """Whether a process holds the folder, be it in a container with numbers of its own."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:  # its maker has just finished
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(handle)
    return False
