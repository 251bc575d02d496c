"""Rows that may be the best of a noisy search, by their noise alone."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mltfr_dist.models.kernels.build import pointer, sizes, usable

CAPACITY = 128
"""Rows of a query that there is room for at first, for each one sought: e^2 are usual."""


def noisy_candidates(
    query_words: Tensor, row_words: Tensor, num_kept: int, reach: float
) -> tuple[Tensor, Tensor] | None:
    """The rows whose Gumbel number may come within ``reach`` of a query's K-th largest.

    Args:
        query_words: [G] int32.
        row_words: [S] int32; the number of a pair follows from both words, see `draws.py`.
        num_kept: K, at most S.
        reach: How far below the K-th largest a row can still be of interest.

    Returns:
        [G, C] int64, indices of the rows, ascending, and after them zeros; and [G] how many they
        are. None where there is no kernel for it.
    """
    kernels = usable(torch.empty(0, device=query_words.device))
    if kernels is None or not 0 < num_kept <= len(row_words):
        return None
    query_words, row_words = query_words.contiguous(), row_words.contiguous()
    counts = torch.zeros(len(query_words), dtype=torch.int64)
    capacity = min(CAPACITY * num_kept, len(row_words))
    while True:
        indices = torch.zeros(len(query_words), capacity, dtype=torch.int32)
        kernels.noisy_candidates(
            *map(pointer, (query_words, row_words, indices, counts)),
            ctypes.c_double(reach),
            *sizes(len(query_words), len(row_words), num_kept, capacity),
        )
        most = max(counts.tolist(), default=0)
        if most <= capacity:
            return indices[:, : max(most, num_kept)].long(), counts
        capacity = most
