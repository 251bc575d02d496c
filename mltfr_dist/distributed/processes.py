"""Other processes of this machine, as /proc shows them: there or gone, stopped or not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

GONE, STOPPED = frozenset("ZXx"), frozenset("Tt")
"""States of /proc/PID/stat: ended (its parent has not asked yet); stopped by signal or debugger."""


class Seen(NamedTuple):
    """A process by what no other shares: numbers are given again, the moment of birth is not."""

    pid: int
    born: int
    """Clock ticks between the start of the machine and that of the process."""

    @property
    def state(self) -> str:
        """One letter, as ps shows it; empty where the process has ended."""
        stat = _stat(self.pid)
        return "" if stat is None or stat[1] != self.born or stat[0] in GONE else stat[0]


def own_process() -> Seen:
    """This process; born at 0 where the system does not say."""
    stat = _stat(os.getpid())
    return Seen(os.getpid(), stat[1] if stat else 0)


def machine() -> str:
    """Names what sees one set of process numbers, until it is started anew.

    Not the host's name: containers on several machines may share one, and a container sees its own
    processes alone. Empty where the system does not say.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _stat(pid: int) -> tuple[str, int] | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], int(fields[19])
