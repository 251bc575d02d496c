"""Real positions without the padding between them: most of a batch of histories is padding, and no work should go there.

Shapes: B users, L positions, N real positions of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mltfr_dist.data.batch import PADDING_IDX


class Packing:
    """The way between a padded batch [B, L, ...] and its real positions [N, ...], row by row."""

    def __init__(self, item_ids: Tensor, *, keep_padding: bool = False) -> None:
        """Args: item_ids: [B, L], padding behind the real positions; keep_padding: take padding for real positions too."""
        real = item_ids != PADDING_IDX
        self.valid_mask = torch.ones_like(real) if keep_padding else real
        self.batch_shape = item_ids.shape
        self._places = self.valid_mask.flatten().nonzero()[:, 0]  # [N]
        counts = self.valid_mask.sum(1)
        before = counts.cumsum(0) - counts  # [B] packed positions of earlier rows
        self.num_items = real.sum(1)
        """[B] real positions of each row, a mask included."""
        self._ends = before + self.num_items - 1

    @property
    def columns(self) -> Tensor:
        """[N] position of each real item in its history."""
        return self._places % self.batch_shape[1]

    def pack(self, padded: Tensor) -> Tensor:
        """[B, L, ...] -> [N, ...]."""
        return padded.flatten(0, 1).index_select(0, self._places)

    def unpack(self, packed: Tensor) -> Tensor:
        """[N, ...] -> [B, L, ...], zero at padding."""
        batch, length = self.batch_shape
        empty = packed.new_zeros(batch * length, *packed.shape[1:])
        return empty.index_copy(0, self._places, packed).view(batch, length, *packed.shape[1:])

    def last(self, packed: Tensor, back: int = 0) -> Tensor:
        """[N, ...] -> [B, ...], each row's last real position, or ``back`` before it; zero where there is none."""
        ends = torch.where(self.num_items > back, self._ends - back, len(packed))
        return torch.cat([packed, packed.new_zeros(1, *packed.shape[1:])]).index_select(0, ends)
