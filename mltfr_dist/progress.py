"""What is shown of a work that goes on: its rate, the time left, lines that fit the terminal."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from time import monotonic
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    import torch

    Blocks = Iterable[tuple[int, torch.Tensor]]
    """(first row, rows [n, D]) after each other."""

SECONDS_IN_LOG, SECONDS_ON_TERMINAL = 10.0, 0.5
"""Between two messages; work that ends before the first is due says nothing."""

WIPED = "\r\x1b[K"
"""What empties the line that a terminal's cursor is in."""


def duration(seconds: float) -> str:
    """A time as a person says it, two units at most: `40 s`, `3 min 05 s`, `2 h 07 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min"


def say(message: str) -> None:
    """Print lines: on a terminal in place of a status line, and broken between words to fit."""
    if sys.stdout is not None and sys.stdout.isatty():
        width = columns(sys.stdout)
        message = WIPED + "\n".join(broken(line, width) for line in message.split("\n"))
    print(message, flush=True)


def say_error(message: str) -> None:
    """Print a paragraph on standard error, on a terminal as :func:`say` does; what stands between
    backticks, to be copied from there, is never broken.
    """
    stream = sys.__stderr__ if sys.stderr is None else sys.stderr
    if stream is not None:  # as after `2>&-`
        print(fit_error(message, stream), file=stream, flush=True)


def fit_error(message: str, stream: TextIO) -> str:
    """What :func:`say_error` prints there."""
    if not stream.isatty():
        return message
    whole = re.sub(r"`[^`\n]*`", lambda code: code[0].replace(" ", "\0"), message)
    lines = [broken(line, columns(stream), hang=0) for line in whole.split("\n")]
    return WIPED + "\n".join(lines).replace("\0", " ")


def broken(line: str, width: int, hang: int = 4) -> str:
    """A line in lines of at most ``width``, the further ones by ``hang`` more to the right."""
    if len(line) <= width:
        return line
    return textwrap.fill(
        line,
        width,
        subsequent_indent=" " * (len(line) - len(line.lstrip()) + hang),
        replace_whitespace=False,
        break_long_words=False,  # paths and ids can be copied whole
        break_on_hyphens=False,
    )


def columns(stream: TextIO) -> int:
    """Columns of the terminal that ``stream`` writes to."""
    try:
        width = os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):
        width = 0
    return width or shutil.get_terminal_size().columns


class StatusLine:
    """How far a work is: on a terminal one line, renewed in place; in a log a line now and then."""

    def __init__(self, stream: TextIO, in_log: float, log: Callable[[str], None]) -> None:
        """Make one that shows nothing yet.

        Args:
            stream: Where a terminal may be.
            in_log: Seconds between two lines where none is.
            log: Takes those lines.
        """
        self._stream, self._log = stream, log
        self._on_terminal = stream is not None and stream.isatty()
        self.pause = SECONDS_ON_TERMINAL if self._on_terminal else in_log

    def show(self, text: str) -> None:
        """Renew the line, cut where the terminal ends; or log ``text``."""
        if self._on_terminal:
            cut = text[: columns(self._stream) - 1]
            print(f"\r{cut}\x1b[K", end="", file=self._stream, flush=True)
        else:
            self._log(text)

    def wipe(self) -> None:
        """Leave an empty line."""
        if self._on_terminal:
            print(WIPED, end="", file=self._stream, flush=True)


def follow(
    blocks: Blocks, what: str, num_rows: int, log: Callable[[str], None]
) -> Iterator[tuple[int, torch.Tensor]]:
    """Hand ``blocks`` on; say how many of ``num_rows`` rows are done, the rate, the time left."""
    line = StatusLine(sys.stderr, SECONDS_IN_LOG, log)
    began = said = monotonic()
    try:
        for start, block in blocks:
            yield start, block
            done, now = start + len(block), monotonic()
            if now - said < line.pause or done >= num_rows:
                continue
            said, rate = now, done / (now - began)
            line.show(
                f"  {what}: {done:,} of {num_rows:,} rows, {rate:,.0f} a second, "
                f"about {duration((num_rows - done) / rate)} left"
            )
    finally:
        if said > began:
            line.wipe()
