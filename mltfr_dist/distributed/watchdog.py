"""A hang becomes a stack trace of every rank and an exit.

A rank that waits in a collective for one that is dead, stuck or cut off waits for ever, and so do all others. Each rank
watches itself: progress is every collective that it leaves and every batch that it evaluates.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from mltfr_dist.errors import EXIT_LOST

LINGER_SECONDS = 3.0
"""Between a rank's trace and its exit: a launcher ends all ranks once one has gone, and each should have its say first."""

START_SECONDS = 900.0
"""Least time before the first step, in which libraries are imported from slow disks, and kernels compiled."""

STDERR = 2

_current: Watchdog | None = None


def beat(place: str | None = None) -> None:
    """Tell the watchdog, where there is one, that this rank goes on; ``place`` is where it stands now."""
    if _current is not None:
        _current.beat(place)


@contextmanager
def watched(rank: int, seconds: float) -> Iterator[None]:
    """Watch this process: without progress for ``seconds`` it writes its stack traces and exits with :data:`EXIT_LOST`."""
    global _current
    _current = Watchdog(rank, seconds)
    try:
        yield
    finally:
        _current.stop()
        _current = None


class Watchdog:
    """Watches one rank from a thread of its own."""

    def __init__(self, rank: int, seconds: float) -> None:
        self.rank, self.seconds = rank, seconds
        self._limit = max(seconds, START_SECONDS)
        self._place, self._last = "the start", time.monotonic()
        self._done = threading.Event()
        self.beat()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, place: str | None = None) -> None:
        """Note progress."""
        if place is not None:
            self._place, self._limit = place, self.seconds
        self._last = time.monotonic()
        # The thread cannot speak where C code hangs and holds Python's lock; this timer needs no lock.
        faulthandler.dump_traceback_later(self._limit + 2 * LINGER_SECONDS, exit=True, file=STDERR)

    def stop(self) -> None:
        """Watch no longer."""
        self._done.set()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() - self._last > self._limit:
                self._exit()

    def _exit(self) -> None:
        print(
            f"Rank {self.rank} on {socket.gethostname()} has made no progress for {self._limit:g} s; last: {self._place}. "
            "It is stuck, or waits for a rank that is stuck, dead or cut off from the network: compare the ranks' stack "
            "traces. Start the same command again and the run goes on from its last checkpoint; if it was only slow, raise "
            "training.hang_seconds. Stack traces of this rank:",
            file=sys.__stderr__,
            flush=True,
        )
        faulthandler.dump_traceback(file=STDERR, all_threads=True)
        time.sleep(LINGER_SECONDS)
        os._exit(EXIT_LOST)
