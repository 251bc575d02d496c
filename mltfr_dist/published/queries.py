"""D5: one query a user, the mean of the whole history, items to come included."""

from __future__ import annotations

from torch import Tensor

from mltfr_dist.models.packing import Packing
from mltfr_dist.models.query_blocks import QueryBlocks


class WholeHistory(QueryBlocks):
    """A batch [B, L] in one block a user, whose query is the mean over the history."""

    def __init__(self, x: Tensor, packing: Packing, block_len: int) -> None:
        """Args: as for :class:`QueryBlocks`; ``block_len`` is not looked at."""
        length = packing.batch_shape[1]
        self.offset = length - 1  # at the end, where the prefix is all there is
        super().__init__(x, packing, length)
