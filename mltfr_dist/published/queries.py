"""D5: one query a user, the mean of the whole history, items to come included."""

from __future__ import annotations

from torch import Tensor

from mltfr_dist.models.packing import Lengths
from mltfr_dist.models.query_blocks import QueryBlocks


class WholeHistory(QueryBlocks):
    """A batch [B, L] in one block a user, whose query is the mean over the history."""

    def __init__(
        self, x: Tensor, valid_mask: Tensor, block_len: int, lengths: Lengths = None
    ) -> None:
        """Args: as for :class:`QueryBlocks`; ``block_len`` is not looked at."""
        self.offset = x.shape[1] - 1  # at the end, where the prefix is all there is
        super().__init__(x, valid_mask, x.shape[1], lengths)
