"""Python's collector of cyclic garbage while a process of ours starts.

Imports make half a million objects that stay to the end. The collector looks through all of them
again and again while they grow in number, and each time that a stage lets go of its model: a fifth
of a short run's time.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager

_starting = False


@contextmanager
def start_up() -> Iterator[None]:
    """Collect nothing until :func:`started` is called, or until the end."""
    global _starting
    _starting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        _leave()


def started() -> None:
    """Never again look through what there is by now. Where the process is not ours: do nothing."""
    if _starting:
        gc.freeze()
        atexit.register(gc.unfreeze)  # libraries complain of what is not let go at the end
    _leave()


def _leave() -> None:
    global _starting
    if _starting:
        gc.enable()
    _starting = False
