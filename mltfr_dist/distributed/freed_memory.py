"""Freed memory stays with the process, so that its next tensors need no new pages.

glibc returns every large block to the system when it is freed, and each page of the next one is
cleared and mapped anew at its first use: a seventh of the time in which a shortlist is chosen.
"""

from __future__ import annotations

import ctypes
import os
import sys

# Parameters of mallopt(3), by their numbers in malloc.h.
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3

MAPPED_BYTES = 32 << 20
"""Blocks from this size on go back to the system at once; glibc allows no more."""
FREE_BYTES = 512 << 20
"""Free memory at the end of the heap that the process keeps at most."""
GROWTH_BYTES = 64 << 20
"""By how much the heap grows at least."""


def keep_freed_memory() -> None:
    """Set glibc's allocator, unless the environment does; elsewhere nothing is done."""
    named = any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ
    if named or sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl has none
        return
    for parameter, value in (
        (MMAP_THRESHOLD, MAPPED_BYTES),
        (TRIM_THRESHOLD, FREE_BYTES),
        (TOP_PAD, GROWTH_BYTES),
    ):
        mallopt(parameter, value)
