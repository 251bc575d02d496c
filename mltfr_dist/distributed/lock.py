"""One process at a time writes a run's folder.

Each start of a run leaves a file in `starts/`: 000001.json, 000002.json and so on, made only if its number is free, which is
one step on network file systems too, and never deleted. The newest is the lock. It is held until it says that its process
has ended, or that process is seen to be gone (on the same machine), or it has given no sign of life for
:data:`SILENT_SECONDS` (on another): then the next start takes the next number, and the earlier one, should it only have been
stopped, finds a newer number than its own and writes nothing more.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from mltfr_dist.distributed.processes import Seen, machine, own_process
from mltfr_dist.errors import CheckpointError, ConfigError
from mltfr_dist.files import write_atomically
from mltfr_dist.schema import Section

STARTS = "starts"

BEAT_SECONDS = 10.0
"""Between two signs of life."""

SILENT_SECONDS = 120.0
"""Without a sign of life for so long, by the clock of the one who looks, a process of another machine counts as gone."""

ENDING_SECONDS = 5.0
"""How long a process that was just killed may take to be gone."""

POLL_SECONDS = 0.2


class Start(Section):
    """A file of `starts/`."""

    host: str
    machine: str
    """See :func:`processes.machine`."""
    pid: int
    born: int
    """See :class:`processes.Seen`."""
    started: str
    ended: str | None = None
    beats: int = 0
    """Signs of life so far."""

    @property
    def who(self) -> str:
        """In words."""
        return f"process {self.pid} on {self.host}, started {self.started}"


class Lock:
    """A run's folder, held by this process; a thread gives signs of life."""

    def __init__(self, folder: Path, number: int, start: Start) -> None:
        self.folder, self.number, self._start = folder, number, start
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._live, name="lock", daemon=True)
        self._thread.start()
        _held.append(self)

    def check(self) -> None:
        """Make sure that no other process has taken the folder over.

        Raises:
            CheckpointError: One has, while this one gave no sign of life.
        """
        newest = newest_start(self.folder)
        if newest > self.number:
            by = read_start(self.folder, newest)
            raise CheckpointError(
                f"{self.folder} was taken over by {by.who if by else 'another process'}, as this one gave no sign of life "
                f"for {SILENT_SECONDS:g} s: it was stopped, or cut off from the folder.",
                rule="One process at a time writes a run's folder.",
                remedy="Nothing is lost: the other one goes on from the last checkpoint.",
            )

    def release(self) -> None:
        """Let go."""
        self._done.set()
        self._thread.join()
        _held.remove(self)
        self._start = self._start.model_copy(update={"ended": _now()})
        self._write()

    def _live(self) -> None:
        while not self._done.wait(BEAT_SECONDS):
            self._start = self._start.model_copy(update={"beats": self._start.beats + 1})
            self._write()

    def _write(self) -> None:
        # A sign of life that fails is like one that does not come; the folder may also have been deleted.
        with suppress(OSError):
            write_atomically(_place(self.folder, self.number), self._start.model_dump_json() + "\n")


_held: list[Lock] = []


def check_held() -> None:
    """Make sure that every folder which this process holds is still its own.

    Raises:
        CheckpointError: See :meth:`Lock.check`.
    """
    for lock in _held:
        lock.check()


def acquire(
    folder: Path, say: Callable[[str], None], goes_on: Callable[[], object] = lambda: None
) -> Lock:
    """Hold ``folder``, which is made if need be, until :meth:`Lock.release`.

    Args:
        folder: Of a run.
        say: Told what is waited for and taken over.
        goes_on: Called again and again while that lasts.

    Raises:
        ConfigError: Another process holds it, or it cannot be written.
    """
    try:
        (folder / STARTS).mkdir(parents=True, exist_ok=True)
        return _acquire(folder, say, goes_on)
    except OSError as error:
        raise ConfigError(
            f"The run's folder {folder} cannot be written: {error.strerror}.",
            remedy="Give another `runs_dir`, or check the disk and the permissions.",
        ) from error


def _acquire(folder: Path, say: Callable[[str], None], goes_on: Callable[[], object]) -> Lock:
    own = own_process()
    start = Start(
        host=socket.gethostname(), machine=machine(), pid=own.pid, born=own.born, started=_now()
    )
    number = newest_start(folder)
    while True:
        if number:
            wait_for_end(folder, number, say, goes_on)
        number += 1
        try:
            with _place(folder, number).open("x") as file:
                file.write(start.model_dump_json() + "\n")
        except FileExistsError:
            continue  # another start was faster, or this machine did not see it yet
        return Lock(folder, number, start)


def wait_for_end(
    folder: Path, number: int, say: Callable[[str], None], goes_on: Callable[[], object]
) -> None:
    """Return once start ``number`` has ended, by its own word or because its process is gone.

    Raises:
        ConfigError: It goes on.
    """
    path = _place(folder, number)
    start, text = read_start(folder, number), _text(path)
    if start is not None and start.ended:
        return
    here = start is not None and start.machine == machine() != ""
    who = start.who if start else "a process that has not said who it is"
    if not here:
        say(
            f"  {folder} is held by {who}; it cannot be seen from here, so its next sign of life is waited for, "
            f"{SILENT_SECONDS:g} s at most"
        )
    deadline = time.monotonic() + (ENDING_SECONDS if here else SILENT_SECONDS)
    while time.monotonic() < deadline:
        start = read_start(folder, number) or start
        if start is not None and start.ended:
            return
        if here and start is not None and not Seen(start.pid, start.born).state:
            say(f"  {folder} is taken over from {who}, which is gone")
            return
        if not here and _text(path) not in ("", text):
            break
        time.sleep(POLL_SECONDS)
        goes_on()
    else:
        if not here:
            say(f"  {folder} is taken over from {who}: it gave no sign of life")
            return
    raise ConfigError(
        f"{folder} is held by {start.who if start else who}.",
        rule="One process at a time writes a run's folder.",
        remedy=f"Wait for it, or have it save and stop{_stop_command(start)}, or give this run another `name`. "
        f"If the folder is a copy of one that is in use, delete {folder / STARTS}.",
    )


def _stop_command(start: Start | None) -> str:
    return f" (`kill -USR1 {start.pid}` on {start.host})" if start else ""


def newest_start(folder: Path) -> int:
    """Number of the newest start; 0 where there is none. Listing a folder also refreshes what a network client knows."""
    try:
        return max(
            (int(p.stem) for p in (folder / STARTS).iterdir() if p.stem.isdecimal()), default=0
        )
    except FileNotFoundError:
        return 0


def read_start(folder: Path, number: int) -> Start | None:
    """What a start says; None where its process was cut off before it could say anything."""
    try:
        return Start.model_validate_json(_text(_place(folder, number)))
    except ValidationError:
        return None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # replaced at this moment, on a network file system
        return ""


def _place(folder: Path, number: int) -> Path:
    return folder / STARTS / f"{number:06d}.json"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
