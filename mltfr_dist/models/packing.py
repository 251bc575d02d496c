"""Real positions without the padding between them: most of a batch of histories is padding, and no work should go there.

Shapes: B users, L positions, N real positions of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mltfr_dist.data.batch import PADDING_IDX


class Packing:
    """The way between a padded batch [B, L, ...] and its real positions [N, ...], row by row."""

    def __init__(self, item_ids: Tensor) -> None:
        """Args: item_ids: [B, L], padding behind the real positions."""
        self.valid_mask = item_ids != PADDING_IDX
        self.batch_shape = item_ids.shape
        self._places = self.valid_mask.flatten().nonzero()[:, 0]  # [N]

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

    def last(self, packed: Tensor) -> Tensor:
        """[N, ...] -> [B, ...], each row's last real position; zero for a row without any."""
        lengths = self.valid_mask.sum(1)
        ends = torch.where(lengths > 0, lengths.cumsum(0) - 1, len(packed))
        return torch.cat([packed, packed.new_zeros(1, *packed.shape[1:])]).index_select(0, ends)
