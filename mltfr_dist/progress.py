"""How far a long work is: its rate and the time left."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator
from time import monotonic

import torch

SECONDS_IN_LOG, SECONDS_ON_TERMINAL = 10.0, 0.5
"""Between two messages; work that ends before the first is due says nothing."""

Blocks = Iterable[tuple[int, torch.Tensor]]
"""(first row, rows [n, D]) after each other."""


def follow(
    blocks: Blocks, what: str, num_rows: int, log: Callable[[str], None]
) -> Iterator[tuple[int, torch.Tensor]]:
    """Hand ``blocks`` on; say how many of ``num_rows`` rows are done, the rate, the time left.

    A terminal shows one line that is renewed and wiped at the end; otherwise ``log`` gets a line
    now and then.
    """
    on_terminal = sys.stderr.isatty()
    pause = SECONDS_ON_TERMINAL if on_terminal else SECONDS_IN_LOG
    began = said = monotonic()
    try:
        for start, block in blocks:
            yield start, block
            done, now = start + len(block), monotonic()
            if now - said < pause or done >= num_rows:
                continue
            said, rate = now, done / (now - began)
            text = (
                f"  {what}: {done:,} of {num_rows:,} rows, {rate:,.0f} a second, "
                f"about {(num_rows - done) / rate:.0f} s left"
            )
            if on_terminal:
                print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
            else:
                log(text)
    finally:
        if on_terminal and said > began:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """A time in the unit that fits: seconds below two minutes, hours above 120 minutes."""
    if seconds < 120:
        return f"{math.ceil(seconds)} s"
    if seconds <= 120 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
