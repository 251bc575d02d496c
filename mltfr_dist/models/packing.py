"""Real positions without the padding between them: most of a batch of histories is padding, and no
work should go there.

Shapes: B users, L positions, N real positions of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mltfr_dist.data.batch import PADDING_IDX

SHORTEST = 0.75
"""Rows of a group are at least this share of its longest one, so that few of its positions are
padding.
"""


Lengths = Sequence[int] | None
"""Real positions of each row, where they are known without asking a device."""


def indices_where(mask: Tensor, count: int | None = None, beyond: int = -1) -> Tensor:
    """[n] int64, where a mask of any shape holds, in the order of its flat positions.

    Args:
        mask: bool.
        count: n, where it is known: a GPU is then not waited for.
        beyond: What stands behind them where ``count`` is more.
    """
    if count is None:
        return mask.flatten().nonzero()[:, 0]
    return torch.nonzero_static(mask.flatten(), size=count, fill_value=beyond)[:, 0]


class Group(NamedTuple):
    """Consecutive rows of like length."""

    size: int
    """Their packed positions."""
    packing: Packing
    """The rows alone, as wide as the longest of them."""


class Packing:
    """The way between a padded batch [B, L, ...] and its real positions [N, ...], row by row."""

    lengths: Lengths = None
    """Positions of each row that are computed on, where they are known."""
    room: int | None = None
    """N, where it is more than there are real positions."""

    def __init__(
        self,
        item_ids: Tensor,
        lengths: Lengths = None,
        *,
        whole: bool = False,
        room: int | None = None,
    ) -> None:
        """Pack the positions that are computed on.

        Args:
            item_ids: [B, L], padding behind the real positions.
            lengths: Real positions of each row, where they are known.
            whole: Whether padding is computed on, too.
            room: N, where it is more than there are real positions: those beyond stand for the last
                place of the last row, which is padding.
        """
        real = item_ids != PADDING_IDX
        self.valid_mask = torch.ones_like(real) if whole else real
        self.batch_shape = item_ids.shape
        self.lengths = [item_ids.shape[1]] * len(item_ids) if whole else lengths
        self._indices = (  # [N]
            torch.arange(item_ids.numel(), device=item_ids.device)
            if whole
            else indices_where(
                real, room or (None if lengths is None else sum(lengths)), real.numel() - 1
            )
        )
        self.room = room
        self.counts = self.valid_mask.sum(1)
        """[B] positions of each row that are computed on."""
        before = self.counts.cumsum(0) - self.counts  # [B] packed positions of earlier rows
        self.item_ids = item_ids
        self.num_items = real.sum(1)
        """[B] real positions of each row, a mask included."""
        self._ends = before + self.num_items - 1

    @property
    def columns(self) -> Tensor:
        """[N] position of each real item in its history."""
        return self._indices % self.batch_shape[1]

    @property
    def rows(self) -> Tensor:
        """[N] row of each real item."""
        return self._indices // self.batch_shape[1]

    @cached_property
    def starts(self) -> Tensor:
        """[B + 1] where each row's positions begin among those of all rows, and N."""
        return F.pad(self.counts.cumsum(0), (1, 0))

    @property
    def are_real(self) -> Tensor:
        """[N] bool: all, or the first of them, where there is room for more."""
        indices = self._indices
        return torch.arange(len(indices), device=indices.device) < self.counts.sum()

    @property
    def read(self) -> Packing:
        """The positions that MLTFR reads and the loss scores: these."""
        return self

    def real(self, x: Tensor) -> Tensor:
        """What stands at the positions of :attr:`read`."""
        return x

    def spread(self, x: Tensor) -> Tensor:
        """The way back, zero elsewhere."""
        return x

    @cached_property
    def groups(self) -> list[Group]:
        """The rows in groups of like length, which a mixing of positions takes one by one.

        On a CPU, where a position of padding costs what an item costs, and where rows come longest
        first, as the stream deals them; a single group elsewhere, for lengths would have to come
        from the device, and many small products keep it waiting.
        """
        whole = [Group(len(self._indices), self)]
        if self.item_ids.device.type != "cpu" or type(self) is not Packing or self.room:
            return whole
        lengths = self.num_items.tolist() if self.lengths is None else list(self.lengths)
        if not any(lengths) or lengths != sorted(lengths, reverse=True):
            return whole
        groups, first = [], 0
        for row in range(1, len(lengths) + 1):
            if row == len(lengths) or lengths[row] < SHORTEST * lengths[first]:
                rows = Packing(self.item_ids[first:row, : lengths[first]], lengths[first:row])
                groups.append(Group(sum(lengths[first:row]), rows))
                first = row
        return [group for group in groups if group.size]

    def divided(self, packed: Tensor) -> list[tuple[Tensor, Packing]]:
        """[N, ...] in the groups of :attr:`groups`, each with the packing of its rows."""
        groups = self.groups
        if len(groups) == 1:
            return [(packed, groups[0].packing)]
        pieces = torch.split(packed, [group.size for group in groups])
        return [(piece, group.packing) for piece, group in zip(pieces, groups, strict=True)]

    def pack(self, padded: Tensor) -> Tensor:
        """[B, L, ...] -> [N, ...]."""
        flat = padded.flatten(0, 1)
        return flat if self._has_all(len(flat)) else flat.index_select(0, self._indices)

    def unpack(self, packed: Tensor) -> Tensor:
        """[N, ...] -> [B, L, ...], zero at padding."""
        batch, length = self.batch_shape
        if self._has_all(batch * length):
            return packed.view(batch, length, *packed.shape[1:])
        empty = packed.new_zeros(batch * length, *packed.shape[1:])
        return empty.index_copy(0, self._indices, packed).view(batch, length, *packed.shape[1:])

    def _has_all(self, num_places: int) -> bool:
        """Whether there is no padding among so many places."""
        return len(self._indices) == num_places and self.room is None

    def last(self, packed: Tensor, back: int = 0) -> Tensor:
        """[N, ...] -> [B, ...], each row's last real position, or ``back`` before it; zero where
        there is none.
        """
        ends = torch.where(self.num_items > back, self._ends - back, len(packed))
        return torch.cat([packed, packed.new_zeros(1, *packed.shape[1:])]).index_select(0, ends)


class Padded(Packing):
    """Histories as whole sequences of one width W, in which padding is computed on as items are.

    Shapes: N here all B W positions, and R the real ones among them.
    """

    def __init__(
        self, item_ids: Tensor, width: int, lengths: Lengths = None, *, in_front: bool
    ) -> None:
        """Args: item_ids: [B, L], padding behind; width: W >= L; lengths: of the rows; in_front:
        where padding goes.
        """
        self._read = Packing(item_ids, lengths)
        item_ids = F.pad(item_ids, (0, width - item_ids.shape[1]))
        if in_front:  # a stable sort: padding first, items in their order
            order = (item_ids != PADDING_IDX).to(torch.uint8).sort(dim=1, stable=True).indices
            item_ids = item_ids.gather(1, order)
        super().__init__(item_ids, lengths, whole=True)
        self._real = indices_where(
            item_ids != PADDING_IDX, None if lengths is None else sum(lengths)
        )

    @property
    def read(self) -> Packing:
        """The real positions [R] of the histories as they came, [B, L]."""
        return self._read

    def real(self, x: Tensor) -> Tensor:
        """[N, ...] -> [R, ...]."""
        return x.index_select(0, self._real)

    def spread(self, x: Tensor) -> Tensor:
        """[R, ...] -> [N, ...], zero at padding."""
        return x.new_zeros(self.item_ids.numel(), *x.shape[1:]).index_copy(0, self._real, x)

    @property
    def causal_mask(self) -> Tensor:
        """[B, W, W] whether a position (row) may read another: items up to it; padding: all."""
        width = self.item_ids.shape[1]
        past = torch.ones(width, width, dtype=torch.bool, device=self.item_ids.device).tril()
        real = self.item_ids != PADDING_IDX
        return (past & real[:, None, :]) | ~real[:, :, None]
