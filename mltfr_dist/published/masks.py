"""D8 and D9: BERT4Rec that reads the position before the mask, and that attends to padding.

Shapes: B users, L positions, W positions that every history is padded to, N = B W.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mltfr_dist.config import BackboneConfig
from mltfr_dist.models.bert4rec import BERT4Rec
from mltfr_dist.models.packing import Lengths, Packing


class ReadsBeforeMask(BERT4Rec):
    """Scores the next item at the history's last item, unless the history is full."""

    def __init__(self, config: BackboneConfig, num_items: int, max_len: int) -> None:
        super().__init__(config, num_items, max_len)
        self.max_len = max_len

    def last(self, hidden: Tensor, packing: Packing) -> Tensor:
        """[N, D] -> [B, D]."""
        at_mask, before = packing.last(hidden), packing.last(hidden, back=1)
        return torch.where(packing.num_items[:, None] <= self.max_len, before, at_mask)


class AttendsToPadding(BERT4Rec):
    """Takes padding, up to the longest history with its mask, for items."""

    def __init__(self, config: BackboneConfig, num_items: int, max_len: int) -> None:
        super().__init__(config, num_items, max_len)
        self.width = max_len + self.num_special_positions

    def pack(self, item_ids: Tensor, lengths: Lengths = None) -> Packing:
        """[B, L] -> all positions up to W."""
        return Widened(item_ids, self.width, lengths)


class Widened(Packing):
    """Histories padded to W, every position of which counts, for the blocks and for MLTFR."""

    def __init__(self, item_ids: Tensor, width: int, lengths: Lengths = None) -> None:
        """Args: item_ids: [B, L]; width: W >= L; lengths: of the rows."""
        self.width = width
        super().__init__(self._widened(item_ids), lengths, whole=True)

    def pack(self, padded: Tensor) -> Tensor:
        """[B, L, ...], L <= W, -> [N, ...], zero behind L."""
        return super().pack(self._widened(padded))

    def _widened(self, t: Tensor) -> Tensor:
        return F.pad(t, (0, 0) * (t.ndim - 2) + (0, self.width - t.shape[1]))
