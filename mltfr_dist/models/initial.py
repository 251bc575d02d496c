"""Initial values of item tables: each a function of (seed, row, column), so that whoever holds a
row draws it alone.

The numbers are the same for any division of the rows and in any order, to the bit: integers are
hashed, and one table of quantiles makes them normal, by operations that round in one way only.
Shapes: R rows of a table, D columns, n rows at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from statistics import NormalDist
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from mltfr_dist.data.batch import PADDING_IDX
from mltfr_dist.models.draws import LARGEST, STEP, mix

CHUNK_ELEMENTS = 1 << 17
"""Numbers drawn at a time: about 5 MB."""
CELLS = 1 << 16
"""Cells of equal probability into which the normal distribution is cut; within one it is linear."""


class RowDraws(NamedTuple):
    """How the rows of a table begin; row 0, the padding, is zero."""

    seed: int
    kind: Literal["normal", "uniform"]
    scale: float
    """Standard deviation of a normal distribution (cut off at 4.5 of them), or largest size of a
    uniform one.
    """

    def rows(self, row_ids: Tensor, dim: int) -> Tensor:
        """[n, D] fp32 values of the rows ``row_ids`` [n]; memory: some chunks beside the result."""
        values = torch.empty(len(row_ids), dim, device="cpu")
        step = max(1, CHUNK_ELEMENTS // dim)
        for start in range(0, len(row_ids), step):
            ids = row_ids[start : start + step].cpu()
            values[start : start + step] = self._values(ids, dim) * (ids != PADDING_IDX)[:, None]
        return values

    @torch.no_grad()
    def fill(self, table: Tensor) -> None:
        """Give a whole table [R, D] its initial values, in place; nothing to one without
        numbers.
        """
        if table.is_meta:
            return
        step = max(1, CHUNK_ELEMENTS // table.shape[1])
        for start in range(0, len(table), step):
            ids = torch.arange(start, min(start + step, len(table)), device="cpu")
            table[start : start + step] = self.rows(ids, table.shape[1])

    def _values(self, row_ids: Tensor, dim: int) -> Tensor:
        keys = mix(mix(row_ids) + self.seed)  # [n]
        columns = torch.arange(1, (dim + 1) // 2 + 1, device="cpu")
        words = mix(keys[:, None] + columns * STEP)  # [n, D / 2], two values a word
        halves = words.view(torch.int32).view(len(row_ids), -1)[:, :dim]
        if self.kind == "uniform":
            return (halves >> 8).float() * (self.scale * 2.0**-23)
        cells, within = (halves >> 16).long() + CELLS // 2, (halves & 0xFFFF).float() / CELLS
        quantiles = normal_quantiles()
        lower = quantiles[cells]
        return (lower + within * (quantiles[cells + 1] - lower)) * self.scale


@cache
def normal_quantiles() -> Tensor:
    """[CELLS + 1] where the cells of the standard normal distribution begin and end; the outermost
    have an end.
    """
    standard, outermost = NormalDist(), 0.25 / CELLS
    shares = [i / CELLS for i in range(1, CELLS)]
    bounds = [standard.inv_cdf(s) for s in (outermost, *shares, 1 - outermost)]
    return torch.tensor(bounds, device="cpu")


class ItemEmbedding(nn.Embedding):
    """An ``nn.Embedding`` whose rows :class:`RowDraws` draws."""

    draws: RowDraws

    def __init__(self, num_rows: int, dim: int) -> None:
        """Args: num_rows: R, row 0 the padding; dim: D."""
        super().__init__(num_rows, dim, padding_idx=PADDING_IDX, _weight=torch.empty(num_rows, dim))
        self.reset("normal", 0.02)

    def reset(self, kind: Literal["normal", "uniform"], scale: float) -> None:
        """Draw all rows, by one number of torch's generator as the seed."""
        self.draws = RowDraws(int(torch.randint(LARGEST, (), device="cpu")), kind, scale)
        if _whole.get():
            self.draws.fill(self.weight)


_whole: ContextVar[bool] = ContextVar("_whole", default=True)


@contextmanager
def undrawn_items() -> Iterator[None]:
    """Item tables made in here are left without values, and take no memory, for who draws some rows
    of them alone.
    """
    token = _whole.set(False)
    try:
        yield
    finally:
        _whole.reset(token)
