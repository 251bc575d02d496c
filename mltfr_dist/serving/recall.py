"""How many of the exactly best items an index finds, and how fast.

Shapes: B histories, D hidden size, I items, k items of a history.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mltfr_dist.models.search import best
from mltfr_dist.models.top_items import top_items
from mltfr_dist.serving.vector_index import Floats, blocks, set_nprobe

Rows = npt.NDArray[np.int64]

BLOCK_BYTES = 1 << 26
"""Vectors that are mapped together."""
ALONE = 20
"""Histories that are also answered one by one."""
RECALL = 0.95
"""What nprobe is chosen to reach where nothing else is asked for."""


@dataclass(frozen=True)
class Measured:
    """One way to answer all histories."""

    name: str
    recall: float
    """Share of the k exactly best items that are found, mean over the histories."""
    batch_ms: float
    """Milliseconds a history, all of them together."""
    alone_ms: float
    """Milliseconds of one history by itself, median."""


def exact(users: Floats, vectors: Floats, k: int) -> tuple[Rows, Measured]:
    """Rows [B, k] of the exactly best items, and what it took.

    Args:
        users: [B, D].
        vectors: [I, D], which may be mapped from a file.
        k: Items of a history.
    """

    def search(some: Floats) -> Rows:
        states, tops = torch.from_numpy(some), []
        for first, block in blocks(vectors, BLOCK_BYTES):
            tops.append(top_items(states, torch.from_numpy(block), k, first_id=first))
        values, ids = (torch.cat(columns, dim=1) for columns in zip(*tops, strict=True))
        rows: Rows = best(values, ids, k)[1].numpy()
        return rows

    return _timed("exact", search, users, None)


def of_index(
    index: Any, users: Floats, best: Rows, nprobe: int | None, recall: float, nlist: int | None
) -> list[Measured]:
    """What the index finds; it keeps the last ``nprobe`` that was tried.

    Args:
        index: Of the item vectors.
        users: [B, D].
        best: [B, k] rows of the exactly best items.
        nprobe: Lists to read; None: 1, 2, 4, ... until ``recall`` is reached, or all are read.
        recall: Of the k best.
        nlist: Lists that there are; None: the index has none.
    """
    k = best.shape[1]

    def search(some: Floats) -> Rows:
        rows: Rows = index.search(some, k)[1]
        return rows

    if nlist is None:
        return [_timed("index", search, users, best)[1]]
    measured = []
    for tried in _doubled(nlist) if nprobe is None else (nprobe,):
        set_nprobe(index, tried)
        measured.append(_timed(f"nprobe {tried}", search, users, best)[1])
        if measured[-1].recall >= recall:
            break
    return measured


def _doubled(most: int) -> Iterator[int]:
    tried = 1
    while tried < most:
        yield tried
        tried *= 2
    yield most


def _timed(
    name: str, search: Callable[[Floats], Rows], users: Floats, best: Rows | None
) -> tuple[Rows, Measured]:
    search(users[:1])  # what comes once
    began = time.perf_counter()
    rows = search(users)
    batch = (time.perf_counter() - began) / len(users)
    alone = []
    for row in range(min(ALONE, len(users))):
        began = time.perf_counter()
        search(users[row : row + 1])
        alone.append(time.perf_counter() - began)
    best = rows if best is None else best
    recall = np.mean([np.isin(a, b).mean() for a, b in zip(best, rows, strict=True)])
    return rows, Measured(name, float(recall), 1e3 * batch, 1e3 * statistics.median(alone))
