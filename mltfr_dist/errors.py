"""Errors for users: what went wrong, where, the rule, the remedy."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from mltfr_dist.progress import say_error

EXIT_BAD_INPUT = 2
"""Exit code of every command that refuses its input."""

EXIT_LOST = 3
"""Exit code of a rank that has lost another: the connection broke, or nothing came for
training.hang_seconds.
"""

EXIT_UNREAD = 141
"""Exit code of a command whose output is not read to its end (`| head`): that of SIGPIPE."""

EXIT_STOPPED = 75
"""Exit code of a run that was asked to stop and saved: start it again (EX_TEMPFAIL of
sysexits.h).
"""


class MltfrError(Exception):
    """A condition the user can put right.

    The message is one paragraph: ``what`` happened, the ``rule`` that it breaks, the ``remedy``.
    Commands print it without a traceback and exit with ``exit_code``.
    """

    exit_code = EXIT_BAD_INPUT

    def __init__(self, what: str, *, rule: str = "", remedy: str) -> None:
        self.what, self.rule, self.remedy = what, rule, remedy
        super().__init__(" ".join(sentence for sentence in (what, rule, remedy) if sentence))

    @property
    def paragraph(self) -> str:
        """What a command prints."""
        return f"{type(self).__name__}: {self}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Survive the way between processes, which an exception with keyword arguments does not by
        itself.
        """
        return _remade, (type(self), self.args, self.__dict__)


def _remade(kind: type[MltfrError], args: tuple[Any, ...], state: dict[str, Any]) -> MltfrError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class ConfigError(MltfrError):
    """A configuration that cannot run: unknown key, wrong type, impossible combination."""


class OtherRankError(MltfrError):
    """Another rank says why; this one only stops, with the same exit code."""

    def __init__(self, what: str, *, remedy: str, exit_code: int = EXIT_BAD_INPUT) -> None:
        super().__init__(what, remedy=remedy)
        self.exit_code = exit_code


class LostRankError(MltfrError):
    """The connection to another rank broke."""

    exit_code = EXIT_LOST


class StoppedError(MltfrError):
    """A signal asked the run to stop; it has saved."""

    exit_code = EXIT_STOPPED


class DataError(MltfrError):
    """Interactions, shards or token tables that are missing, malformed or damaged."""


class CheckpointError(MltfrError):
    """A checkpoint or run folder that cannot be used."""


class DamagedError(CheckpointError):
    """A checkpoint that is not what was written; the one before it may be."""


def fail(error: MltfrError) -> int:
    """Print a user's error without a traceback; returns the exit code."""
    if not isinstance(error, OtherRankError):
        say_error(error.paragraph)
    return error.exit_code


class Pipe:
    """What came of a command's output."""

    exit_code = 0


@contextmanager
def quiet_pipe() -> Iterator[Pipe]:
    """End without noise where nobody reads our output any more, as under `| head`."""
    pipe = Pipe()
    try:
        try:
            yield pipe
        finally:
            if sys.stdout is not None:  # as after `>&-`
                sys.stdout.flush()  # here, where the error can be caught, and not at the very end
    except BrokenPipeError:
        if not _has_lost_its_reader(sys.stdout):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        pipe.exit_code = EXIT_UNREAD


def _has_lost_its_reader(stream: TextIO) -> bool:
    """Whether a stream is a pipe without a reader; other pipes and connections break, too."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
