"""Counting better scores, and finding the best, while scores are in registers: see
``models/rank_counts.py`` and ``models/top_items.py``.

Shapes: B users, T items, D numbers of each, K items sought.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mltfr_dist.models.kernels.build import pointer, sizes, usable
from mltfr_dist.models.kernels.work import did_products

MIN_USERS = 8
"""Users at least: putting the items into order costs as much as scoring them for as many."""


class LeftOut(NamedTuple):
    """Which items do not count for whom."""

    bounds: Tensor
    """[B + 1] int64, where the indices of each user begin."""
    indices: Tensor
    """[S] int64 indices of items among all at hand, ascending for each user, none twice."""


def count_between(
    hidden: Tensor,
    vectors: Tensor,
    low: Tensor,
    high: Tensor,
    targets: Tensor,
    left_out: LeftOut,
    start: int,
    counts: Tensor,
    powers: Tensor | None,
) -> None:
    """Count the items that score higher than each user's target, and those that score the same.

    Where :func:`counts_in_registers` says so. All numbers are finite and in fp32.

    Args:
        hidden: [B, D].
        vectors: [T, D].
        low: [B] what scores no more than this in fp32 certainly scores less than the target.
        high: [B] what scores more than this in fp32 certainly scores more.
        targets: [B] exact scores of the targets.
        left_out: What does not count.
        start: Index of the first item.
        counts: [2, B] int64 to which better and equal ones are added.
        powers: [2, B] float64, what scores are shifted by (-inf before the first), and the sums of
            exponentials of all shifted scores, what does not count included; both are brought up to
            date. None: not asked for.
    """
    kernels = usable(hidden, vectors, low, high, targets)
    assert kernels is not None
    assert hidden.shape[1] == vectors.shape[1]
    assert len(hidden) == len(low) == len(high) == len(targets) == len(left_out.bounds) - 1
    assert counts.shape == (2, len(hidden))
    shifts, sums = (None, None) if powers is None else powers
    read = [t.contiguous() for t in (hidden, vectors, low, high, targets, *left_out)]
    shape = sizes(len(hidden), len(vectors), hidden.shape[1], start)
    kernels.count_better(*map(pointer, (*read, *counts, shifts, sums)), *shape)
    did_products(len(hidden) * len(vectors), hidden.shape[1])


def counts_in_registers(hidden: Tensor, targets: Tensor) -> bool:
    """Whether :func:`count_between` takes states [B, D] and targets' scores [B], and pays."""
    suits = len(hidden) >= MIN_USERS and hidden.shape[1] > 0
    return suits and usable(hidden, targets) is not None


def leaders(
    hidden: Tensor, vectors: Tensor, error: Tensor, left_out: LeftOut, count: int, items: int
) -> tuple[Tensor, Tensor]:
    """Exact scores and indices [B, K] of the ``count`` items of highest score, best first; of equal
    scores the lower indices; -inf and 0 where fewer are left.

    Where :func:`leads_in_registers` says so. All numbers are finite.

    Args:
        hidden: [B, D].
        vectors: [T, D].
        error: [B] float64 bound of the error of any computed score.
        left_out: What must not be found.
        count: K.
        items: How many are put into order at a time.
    """
    kernels = usable(hidden, vectors)
    assert kernels is not None
    assert hidden.shape[1] == vectors.shape[1]
    assert len(hidden) == len(error) == len(left_out.bounds) - 1
    scores = hidden.new_empty(len(hidden), count)
    indices = torch.empty(scores.shape, dtype=torch.int64)
    read = [t.contiguous() for t in (hidden, vectors, error, *left_out)]
    shape = sizes(len(hidden), *vectors.shape, count, items)
    kernels.top_items(*map(pointer, (*read, scores, indices)), *shape)
    did_products(len(hidden) * len(vectors), hidden.shape[1])
    return scores, indices


def leads_in_registers(hidden: Tensor, vectors: Tensor) -> bool:
    """Whether :func:`leaders` takes states [B, D] and vectors [T, D], and pays."""
    suits = len(hidden) >= MIN_USERS and hidden.shape[1] > 0 and 0 < len(vectors) < 2**31
    return suits and usable(hidden, vectors) is not None
