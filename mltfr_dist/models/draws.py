"""Random numbers that are functions of a counter: the same in any process, any batch and on any
device.

Shapes: B users, L positions, G queries, S rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mltfr_dist.data.batch import PADDING_IDX

MULTIPLIERS = (-4658895280553007687, -7723592293110705685)
"""Of splitmix64 (Steele et al. 2014), as signed numbers."""
MULTIPLIERS32 = (0x7FEB352D, 0x846CA68B - (1 << 32))
STEP = -7046029254386353131
"""2^64 / golden ratio, as a signed number."""
LARGEST = (1 << 63) - 1
EPS = 1e-10
"""Keeps the logarithms of Gumbel noise finite (as published)."""


def mix(z: Tensor) -> Tensor:
    """splitmix64's finaliser on int64, which wraps: a counter to a number that looks random."""
    z = (z ^ ((z >> 30) & (LARGEST >> 29))) * MULTIPLIERS[0]
    z = (z ^ ((z >> 27) & (LARGEST >> 26))) * MULTIPLIERS[1]
    return z ^ ((z >> 31) & (LARGEST >> 30))


def history_keys(item_ids: Tensor) -> Tensor:
    """[B, L] int64: a hash of each position's past, itself included, and of nothing else; padding
    adds nothing.
    """
    positions = torch.arange(1, item_ids.shape[1] + 1, device=item_ids.device)
    return (mix(mix(item_ids) + positions * STEP) * (item_ids != PADDING_IDX)).cumsum(1)


class GumbelNoise(NamedTuple):
    """Gumbel(0, 1) noise, times ``scale``, for each pair of a query and a row of a table."""

    keys: Tensor
    """[G] int64, of the queries: what stays the same while a seed, a step, a user and a table
    do.
    """
    row_ids: Tensor
    """[S] int64, row numbers in the table."""
    scale: float

    def of(self, queries: slice) -> Tensor:
        """[g, S], of some queries and all rows."""
        return self._values(self.keys[queries], self.row_ids)

    def at(self, indices: Tensor) -> Tensor:
        """[G, K], of every query and its rows at ``indices`` [G, K] of ``row_ids``."""
        return self._values(self.keys, self.row_ids[indices])

    def _values(self, keys: Tensor, row_ids: Tensor) -> Tensor:
        """Keys and rows are mixed in 64 bits, each pair in 32: a whole table for every user is
        drawn at each step.
        """
        query_words, row_words = words_of(keys, row_ids)
        words = mix32(query_words[:, None] ^ row_words)
        uniform = (((words >> 8) & ((1 << 24) - 1)).float() + 0.5) * 2.0**-24
        return self.scale * gumbel(uniform)


def words_of(keys: Tensor, row_ids: Tensor) -> tuple[Tensor, Tensor]:
    """What a pair's number follows from: int32 of queries [G] and of rows, of their shape."""
    return low_half(mix(keys)), low_half(mix(row_ids * STEP))


def low_half(z: Tensor) -> Tensor:
    """The lower 32 bits of int64, as int32."""
    return z.view(torch.int32).view(*z.shape, 2)[..., 0]


def mix32(z: Tensor) -> Tensor:
    """A 32-bit finaliser (Wellons 2018, lowbias32) on int32, which wraps."""
    z = (z ^ ((z >> 16) & 0xFFFF)) * MULTIPLIERS32[0]
    z = (z ^ ((z >> 15) & 0x1FFFF)) * MULTIPLIERS32[1]
    return z ^ ((z >> 16) & 0xFFFF)


def gumbel(uniform: Tensor) -> Tensor:
    """Numbers uniform in (0, 1) to Gumbel(0, 1) ones."""
    return -torch.log(-torch.log(uniform + EPS) + EPS)
