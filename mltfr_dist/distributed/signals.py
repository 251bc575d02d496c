"""SIGUSR1 and SIGTERM ask a run to save and stop; the ranks agree on the step (health.py), then
stop there. A run may also be told in advance after which epoch.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)

_requested = threading.Event()
_pause: list[int] = []
"""Epochs after which the run stops; at most one number."""


def stop_requested() -> bool:
    """Whether this process was asked to stop."""
    return _requested.is_set()


def request_stop() -> None:
    """What a stop signal does."""
    _requested.set()


def pause_after(epochs: int) -> None:
    """Ask the next run to save and stop once it has validated and has ``epochs`` or more behind it,
    over both stages. All ranks must call.
    """
    _pause[:] = [epochs]


def pauses_after(epochs: int) -> bool:
    """Whether a run stops that has so many epochs behind it."""
    return any(epochs >= wanted for wanted in _pause)


def forget_request() -> None:
    """Begin anew, in a process that goes from one run to the next."""
    _requested.clear()
    _pause.clear()


@contextmanager
def stop_signals() -> Iterator[None]:
    """Take the stop signals as a request while a run goes, and as before afterwards.

    Once asked they are ignored: the first rank that exits makes a launcher end the others, whose
    exit code should say why.
    """
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # Python takes signals in the main thread alone
        yield
        return
    _requested.clear()
    before = {number: signal.signal(number, _request) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if stop_requested() else handler)


def _request(_number: int, _frame: FrameType | None) -> None:
    request_stop()
