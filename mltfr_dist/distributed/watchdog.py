"""A hang becomes a stack trace of every rank and an exit.

A rank that waits in a collective for one that is dead, stuck or cut off waits for ever, and so do
all others. Each rank watches itself: progress is every collective that it leaves and every batch
that it evaluates. Only time in which this rank ran counts: not that in which it was stopped
(SIGSTOP, a scheduler that suspends jobs, a paused container, a laptop asleep), nor that in which
another rank of the same machine was.
"""

from __future__ import annotations

import faulthandler
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from mltfr_dist.distributed.last_word import last_word
from mltfr_dist.distributed.processes import STOPPED, Seen
from mltfr_dist.errors import EXIT_LOST
from mltfr_dist.progress import say_error

LINGER_SECONDS = 3.0
"""From a rank's trace to its exit: a launcher ends all ranks once one has gone, and each should
have its say first.
"""

START_SECONDS = 900.0
"""Least time before the first step, in which libraries are imported from slow disks, and kernels
compiled.
"""

SPEECHLESS_SECONDS = 43200.0
"""After so long a process ends whose C code hangs and holds Python's lock, so that no thread can
watch. That clock cannot tell stopped from stuck, so it is a long one; other ranks end first."""

STDERR = 2

_current: Watchdog | None = None


def heartbeat(at: str | None = None) -> None:
    """Tell the watchdog, where there is one, that this rank goes on; ``at`` is where it stands
    now.
    """
    if _current is not None:
        _current.heartbeat(at)


@contextmanager
def watched(rank: int, seconds: float) -> Iterator[None]:
    """Watch this process: without progress for ``seconds`` it writes its stack traces and exits
    with :data:`EXIT_LOST`.
    """
    global _current
    _current = Watchdog(rank, seconds)
    try:
        yield
    finally:
        _current.stop()
        _current = None


def watch_with(neighbours: Mapping[int, Seen]) -> None:
    """Tell the watchdog, where there is one, the other ranks of this machine.

    While one is stopped, no time counts.
    """
    if _current is not None:
        _current.neighbours = dict(neighbours)


class Watchdog:
    """Watches one rank from a thread of its own."""

    def __init__(self, rank: int, seconds: float) -> None:
        self.rank, self.seconds = rank, seconds
        self.neighbours: dict[int, Seen] = {}
        self._limit = max(seconds, START_SECONDS)
        self._at, self._beats = "the start", 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def heartbeat(self, at: str | None = None) -> None:
        """Note progress."""
        if at is not None:
            self._at, self._limit = at, self.seconds
        self._beats += 1

    def stop(self) -> None:
        """Watch no longer."""
        self._done.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        every = min(1.0, self.seconds / 4)
        silent, beats, before = 0.0, self._beats, time.monotonic()
        told: int | None = None
        while not self._done.wait(every):
            faulthandler.dump_traceback_later(
                max(SPEECHLESS_SECONDS, 2 * self._limit), exit=True, file=STDERR
            )
            now = time.monotonic()
            ran, before = min(now - before, 2 * every), now  # it was stopped where more has passed
            stopped = self._stopped_neighbour()
            if stopped is not None and stopped != told:
                self._tell(stopped)
            told = stopped
            if beats != self._beats:
                silent, beats = 0.0, self._beats
            elif stopped is None:
                silent += ran
            if silent > self._limit:
                self._exit()

    def _stopped_neighbour(self) -> int | None:
        return next((r for r, seen in self.neighbours.items() if seen.state in STOPPED), None)

    def _tell(self, rank: int) -> None:
        pid = self.neighbours[rank].pid
        say_error(
            f"Rank {self.rank} waits for rank {rank}, process {pid} of the same machine, which is "
            f"stopped; `kill -CONT {pid}` lets it go on.",
        )

    def _exit(self) -> None:
        """Traces first: what to do stands at the end, where it is read, below those of all
        ranks.
        """
        rank = f"Rank {self.rank} on {socket.gethostname()}"
        say_error(f"{rank}, stack traces:")
        faulthandler.dump_traceback(file=STDERR, all_threads=True)
        time.sleep(LINGER_SECONDS / 2)
        text = (
            f"{rank} has made no progress for {self._limit:g} s; last: {self._at}. It is stuck, "
            f"or waits for a rank "
            "that is stuck, dead or cut off from the network: compare the ranks' stack traces "
            "above. Start the same command "
            "again and the run goes on from its last checkpoint; if it was only slow, raise "
            "training.hang_seconds."
        )
        say_error(text)
        last_word(text)
        time.sleep(LINGER_SECONDS / 2)
        os._exit(EXIT_LOST)
