"""Ctrl-C, SIGTERM, SIGHUP and SIGUSR1. A run saves and stops: its ranks agree on the step
(health.py). What has nothing to save ends at once, in a sentence (:func:`ended_by_signals`). A run
may also be told in advance after which epoch it stops.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from mltfr_dist.distributed.last_word import last_word
from mltfr_dist.distributed.launch import expected_rank
from mltfr_dist.errors import EXIT_STOPPED, StoppedError
from mltfr_dist.progress import fit_error

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)

_requested = threading.Event()
_pause: list[int] = []
"""Epochs after which the run stops; at most one number."""
_ending: list[int] = []
"""The signal that ends this process, once one does. Ray pickles the handler, which an event
forbids.
"""


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

    Once asked, or once a rank has failed, they are ignored: the first rank that exits makes a
    launcher end the others, whose exit code should say why. Without a launcher a second Ctrl-C does
    what it did before.
    """
    if (
        threading.current_thread() is not threading.main_thread()
    ):  # Python takes signals in the main thread alone
        yield
        return
    _requested.clear()
    before = taken()

    def request(number: int, _frame: FrameType | None) -> None:
        leave_lost_terminal()
        again = stop_requested()
        request_stop()
        if not again and expected_rank() == 0:
            tell(f"{asked(number)}: the run saves at its next step{unless_again(number)}")
        if number == signal.SIGINT and is_alone():
            signal.signal(number, before[number])

    for number in before:
        signal.signal(number, request)
    failed = True
    try:
        yield
        failed = False
    finally:
        ignored = stop_requested() or (failed and not is_alone())
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if ignored else handler)


@contextmanager
def ended_by_signals(words: str = "") -> Iterator[None]:
    """Meanwhile a stop signal ends this process, which has nothing to save, at once.

    Not by an exception, which libraries that are being imported may swallow.

    Args:
        words: What ends and what of it stays, for one paragraph and the exit code of what goes on
            when it is started again. Empty: it ends in silence, as by a signal that nobody takes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _frame: FrameType | None) -> None:
        leave_lost_terminal()
        remedy = "Start the same command again and it goes on."
        error = StoppedError(f"{asked(number)} ended {words}.", remedy=remedy)
        _ending.append(number)
        end_children()
        with suppress(OSError, RuntimeError, ValueError):  # it may be written to in this moment
            sys.stdout.flush()
        if expected_rank() == 0:
            tell(error.paragraph)
            last_word(error.paragraph, stopped=True)
        os._exit(EXIT_STOPPED)

    before = taken()
    for number in before:
        signal.signal(number, end if words else signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) != signal.SIG_IGN:  # by a run that was asked to stop
                signal.signal(number, handler)


def taken() -> dict[int, signal._HANDLER]:
    """The stop signals with their handlers, but those that are ignored: under nohup a dropped
    connection stops nothing.
    """
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    return {  # None: not one of Python's, which cannot be set again
        number: handler
        for number, handler in before.items()
        if handler is not None and handler != signal.SIG_IGN
    }


def is_ending() -> bool:
    """Whether a signal ends this process now, and it its children: whoever misses one says
    nothing.
    """
    return bool(_ending)


def end_children() -> None:
    """End all that this process has started, and what they have, at once."""
    import psutil

    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            process.kill()


def is_alone() -> bool:
    """Whether no launcher started this process: those pass on what was sent to them as well."""
    return "MASTER_ADDR" not in os.environ


def asked(number: int) -> str:
    """A signal as it is told."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def unless_again(number: int) -> str:
    """How to end at once, where a person asked; a lost connection may send a signal twice."""
    return "; once more to end at once" if number == signal.SIGINT and is_alone() else ""


def tell(line: str) -> None:
    """Print on standard error, from within a signal's handler: not by a stream, that may be in
    use.
    """
    with suppress(OSError):
        os.write(2, f"{fit_error(line, sys.__stderr__) if sys.__stderr__ else line}\n".encode())


def leave_lost_terminal() -> None:
    """Write nowhere in place of a terminal whose connection was dropped: each line would fail."""
    for stream in (1, 2):
        try:
            termios.tcgetattr(stream)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
