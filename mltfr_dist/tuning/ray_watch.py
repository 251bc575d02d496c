"""Ray's daemons die, or its folder is full: the sweep says so in one line, and ends."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import ray

from mltfr_dist.distributed.signals import end_children, is_ending, taken
from mltfr_dist.errors import EXIT_LOST, LostRankError, StoppedError, fail
from mltfr_dist.progress import say

LOW = 8 * 2**20
"""Bytes free in Ray's folder below which no process may start: Ray waits for it for ever."""

STUCK_SECONDS = 90.0
"""How long a sweep waits without room while no trial trains."""

WATCH_SECONDS = 0.1
NOTE_SECONDS = 1.0
"""Between two looks at what the daemons have started, which takes some milliseconds."""


@contextmanager
def ray_watched() -> Iterator[None]:
    """Meanwhile end this process, and what it has started, once a daemon of its Ray is gone.

    Ray itself would go on for up to a minute, print its whole state, and fail every trial.
    """
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(daemons(), over), name="ray-watch", daemon=True)
    watch.start()
    try:
        yield
    finally:
        over.set()
        watch.join()


def quieten() -> None:
    """Keep Ray's messages to its logs: of a dead daemon it would print the whole state here. And
    let the sweep take signals: Ray would end the process at a SIGTERM, in silence.
    """
    ray._private.utils.set_sigterm_handler = lambda _handler: None
    ray._private.worker.print_to_stdstream = lambda *_given, **_more: None


def take_signals_again() -> None:
    """Have the handlers that there were before Ray started: it puts one below Python's, which
    prints where each thread is.
    """
    for number, handler in taken().items():
        signal.signal(number, handler)


def session_folder() -> Path:
    """Where the Ray that this process is connected to keeps its files on this machine."""
    return Path(ray._private.worker._global_node.get_session_dir_path())


def room_is_low() -> bool:
    """Whether Ray's folder is all but full."""
    return shutil.disk_usage(session_folder()).free < LOW


class Room:
    """Watches the room in Ray's folder. Trials go on without any, one after the other, as long as
    no process has to start.
    """

    def __init__(self) -> None:
        self._told, self._since = False, 0.0

    def is_needed(self, *, trains: bool) -> bool:
        """Whether the sweep cannot go on; ``trains`` says whether a trial does now. Asked again and
        again.
        """
        if not room_is_low():
            self._told, self._since = False, 0.0
            return False
        if not self._told:
            self._told = True
            what = "no process can start, trials go on in those that are there"
            say(f"  Ray's folder {session_folder()} is full: {what}")
        if trains or not self._since:
            self._since = time.monotonic()
        return time.monotonic() - self._since > STUCK_SECONDS


def is_full(error: OSError) -> bool:
    """Whether a write found no room."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def no_room(saved: str) -> StoppedError:
    """The error that ends a sweep without room."""
    return StoppedError(
        f"There is no room left in {session_folder()}, where Ray keeps its files; {saved}",
        remedy="Make room there, or set TMPDIR to a folder with room; then start the same command "
        "again and it goes on.",
    )


def daemons() -> list[psutil.Process]:
    """Daemons on this machine of this process's Ray: its raylet, and GCS where it is here."""
    socket = str(ray._private.worker._global_node.raylet_socket_name)
    marks = {
        "raylet": f"--raylet_socket_name={socket}",
        "gcs_server": f"--log_dir={session_folder()}/logs",
    }
    processes = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            mark = marks.get(process.name())
            if mark is not None and mark in process.cmdline():
                processes.append(process)
    return processes


def _watch(watched: list[psutil.Process], over: threading.Event) -> None:
    names = {process.pid: process.name() for process in watched}
    started: set[psutil.Process] = set()
    noted = 0.0
    while not over.wait(WATCH_SECONDS):
        for process in watched:
            if not _lives(process) and not is_ending():
                _end(f"Ray's {names[process.pid]} (process {process.pid})", started)
        if time.monotonic() - noted > NOTE_SECONDS:
            noted = time.monotonic()
            started = {child for process in watched for child in _children(process)}


def _children(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.Error):
        return process.children()
    return []


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _end(what: str, started: Iterable[psutil.Process]) -> None:
    """End this process, what it has started, and what the lost daemon had: its agents, which are
    nobody's children now and look for it only now and then.
    """
    sys.stdout.flush()
    fail(
        LostRankError(
            f"{what} was killed or has crashed, and with it the trials that ran.",
            remedy="Start the same command again and it goes on from their last checkpoints.",
        )
    )
    end_children()
    for process in started:
        with suppress(psutil.Error):
            process.kill()
    os._exit(EXIT_LOST)
