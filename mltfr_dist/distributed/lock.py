"""One process at a time writes a run's folder.

The process that does has a file in `lock/`, 000001.json or the next number, made only if that
number is free, which is one step on network file systems too. The newest counts. It is deleted when
its process ends in order; else it is taken over by the next number once that process is seen to be
gone (on the same machine) or has given no sign of life for :data:`SILENT_SECONDS` (on another).
Should it only have been stopped, it finds a newer file than its own and writes nothing more.
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

LOCK = "lock"

BEAT_SECONDS = 10.0
"""Between two signs of life."""

SILENT_SECONDS = 120.0
"""Without a sign of life for so long, by the clock of the one who looks, a process of another
machine counts as gone."""

ENDING_SECONDS = 5.0
"""How long a process that was just killed may take to be gone."""

POLL_SECONDS = 0.2


class Holder(Section):
    """A file of `lock/`."""

    host: str
    machine: str
    """See :func:`processes.machine`."""
    pid: int
    born: int
    """See :class:`processes.Seen`."""
    started: str
    beats: int = 0
    """Signs of life so far."""

    @property
    def who(self) -> str:
        """In words."""
        return f"process {self.pid} on {self.host}, started {self.started}"

    def is_same(self, other: Holder | None) -> bool:
        """Whether both are one process's hold, at any sign of life."""
        return other is not None and other.model_copy(update={"beats": self.beats}) == self


class Lock:
    """A run's folder, held by this process; a thread gives signs of life."""

    def __init__(self, folder: Path, number: int, holder: Holder) -> None:
        self.folder, self.number, self._holder = folder, number, holder
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._live, name="lock", daemon=True)
        self._thread.start()
        _held.append(self)

    def check(self) -> None:
        """Make sure that no other process has taken the folder over.

        Raises:
            CheckpointError: One has, while this one gave no sign of life.
        """
        newest = newest_number(self.folder)
        by = read_holder(self.folder, newest) if newest else self._holder
        if newest > self.number or (newest == self.number and not self._holder.is_same(by)):
            raise CheckpointError(
                f"{self.folder} was taken over by {by.who if by else 'another process'}, as this "
                f"one gave no sign of life for {SILENT_SECONDS:g} s: it was stopped, or cut off "
                "from the folder.",
                rule="One process at a time writes a run's folder.",
                remedy="Nothing is lost: the other one goes on from the last checkpoint.",
            )

    def release(self) -> None:
        """Let go, and leave nothing behind."""
        self._done.set()
        self._thread.join()
        _held.remove(self)
        # What cannot be deleted is taken over later; `lock/` stays where another has a file in it.
        with suppress(OSError):
            for number in range(1, self.number):
                _path(self.folder, number).unlink(missing_ok=True)  # taken over from
            if self._holder.is_same(read_holder(self.folder, self.number)):
                _path(self.folder, self.number).unlink(missing_ok=True)
            (self.folder / LOCK).rmdir()

    def _live(self) -> None:
        while not self._done.wait(BEAT_SECONDS):
            if not self._holder.is_same(read_holder(self.folder, self.number)):
                continue  # deleted by hand, and perhaps another's by now
            self._holder = self._holder.model_copy(update={"beats": self._holder.beats + 1})
            # A sign of life that fails is like one that does not come.
            with suppress(OSError):
                write_atomically(
                    _path(self.folder, self.number), self._holder.model_dump_json() + "\n"
                )


_held: list[Lock] = []


def check_held() -> None:
    """Make sure that every folder which this process holds is still its own.

    Raises:
        CheckpointError: See :meth:`Lock.check`.
    """
    for lock in _held:
        lock.check()


def acquire(
    folder: Path, say: Callable[[str], None], heartbeat: Callable[[], object] = lambda: None
) -> Lock:
    """Hold ``folder``, which is made if need be, until :meth:`Lock.release`.

    Args:
        folder: Of a run.
        say: Told what is waited for and taken over.
        heartbeat: Called again and again while that lasts.

    Raises:
        ConfigError: Another process holds it, or it cannot be written.
    """
    try:
        while True:
            lock = _try(folder, say, heartbeat)
            if lock is not None:
                return lock
    except OSError as error:
        raise ConfigError(
            f"The run's folder {folder} cannot be written: {error.strerror}.",
            remedy="Give another `runs_dir`, or check the disk and the permissions.",
        ) from error


def _try(folder: Path, say: Callable[[str], None], heartbeat: Callable[[], object]) -> Lock | None:
    """Wait for the newest holder's end, take the next number; None where another was faster."""
    (folder / LOCK).mkdir(parents=True, exist_ok=True)
    before = newest_number(folder)
    left = wait_for_end(folder, before, say, heartbeat) if before else None
    own = own_process()
    holder = Holder(
        host=socket.gethostname(),
        machine=machine(),
        pid=own.pid,
        born=own.born,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    path = _path(folder, before + 1)
    try:
        with path.open("x") as file:
            file.write(holder.model_dump_json() + "\n")
    except (FileExistsError, FileNotFoundError):  # made by another start; or `lock/` just deleted
        return None
    if newest_number(folder) > before + 1 or (before and _text(_path(folder, before)) != left):
        path.unlink()  # what this start looked at was no longer so
        return None
    return Lock(folder, before + 1, holder)


def wait_for_end(
    folder: Path, number: int, say: Callable[[str], None], heartbeat: Callable[[], object]
) -> str | None:
    """Return once a holder's process is gone.

    Returns:
        What it left: the text of its file; None where it ended in order and left nothing.

    Raises:
        ConfigError: It goes on.
    """
    path = _path(folder, number)
    text, holder = _text(path), read_holder(folder, number)
    who = holder.who if holder else "a process that was cut off before it said who it is"
    here = holder is not None and holder.machine == machine() != ""
    if text is not None and not here:
        say(
            f"  {folder} is held by {who}, which cannot be seen from here: waiting up to "
            f"{SILENT_SECONDS:g} s for its next sign of life"
        )
    deadline = time.monotonic() + (ENDING_SECONDS if here else SILENT_SECONDS)
    while time.monotonic() < deadline:
        now = _text(path)
        if now is None:
            return None
        if here and holder is not None and not Seen(holder.pid, holder.born).state:
            say(f"  {folder} is taken over from {who}, which is gone")
            return now
        if not here and now not in ("", text):
            break
        time.sleep(POLL_SECONDS)
        heartbeat()
    else:
        if not here:
            say(f"  {folder} is taken over from {who}, which gave no sign of life")
            return text
    holder = read_holder(folder, number) or holder
    stop = f" (`kill -USR1 {holder.pid}` on {holder.host})" if holder else ""
    raise ConfigError(
        f"{folder} is held by {holder.who if holder else who}.",
        rule="One process at a time writes a run's folder.",
        remedy=f"Wait for it, or have it save and stop{stop}, or give this run another `name`. "
        f"If the folder is a copy of one that is in use, delete {folder / LOCK}.",
    )


def newest_number(folder: Path) -> int:
    """The newest file's number; 0 where there is none. A network client lists anew each time."""
    try:
        names = [path.stem for path in (folder / LOCK).iterdir()]
    except FileNotFoundError:
        return 0
    return max((int(name) for name in names if name.isdecimal()), default=0)


def read_holder(folder: Path, number: int) -> Holder | None:
    """Who holds; None where the file says nothing, or is not there."""
    try:
        return Holder.model_validate_json(_text(_path(folder, number)) or "")
    except ValidationError:
        return None


def _text(path: Path) -> str | None:
    """A file's text; None where there is no file, empty where it is being replaced."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return None
    except OSError:
        return ""


def _path(folder: Path, number: int) -> Path:
    return folder / LOCK / f"{number:06d}.json"
