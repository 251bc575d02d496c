"""Positions cut into blocks that share a query.

Shapes: B users, L positions, n positions a block, G blocks that hold a real position, N real
positions, D hidden size.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from mltfr_dist.models.draws import history_keys
from mltfr_dist.models.kernels import Blocks, block_means, usable
from mltfr_dist.models.packing import Packing, indices_where


def prefix_mean(x: Tensor, valid_mask: Tensor) -> Tensor:
    """Mean of x over each position's past, itself included.

    Args:
        x: [B, L, D].
        valid_mask: [B, L] bool.

    Returns:
        [B, L, D]; position t depends on positions <= t alone.
    """
    counts = valid_mask.cumsum(1).clamp(min=1)[..., None]
    return (x * valid_mask[..., None]).cumsum(1) / counts


class QueryBlocks:
    """A batch in blocks of n positions; a block's query is the prefix mean at its first one, and so
    causal for all.
    """

    x: Tensor
    """[N, D] the real positions."""
    queries: Tensor
    """[G, D]."""
    packed: Blocks | None = None
    """The blocks of ``x`` as it is, for kernels; None where there are none."""
    offset = 0
    """Where in a block its query is taken."""

    def __init__(self, x: Tensor, packing: Packing, block_len: int) -> None:
        """Args: x: [N, D] input embeddings of the real positions; packing: where they stand;
        block_len: n.
        """
        self.x, self.packing, self.block_len = x, packing, block_len
        if usable(x) is None:
            means = prefix_mean(packing.unpack(x), packing.valid_mask)
            self.queries = self._held(self.at_queries(means))
        else:
            self.queries, self.packed = block_means(x, packing.counts, block_len, self.offset)

    @cached_property
    def occupied(self) -> Tensor:
        """[B, ceil(L / n)], which blocks hold a real position."""
        return self._cut(self.packing.valid_mask)[..., 0]  # sequences start at 0 and have no gaps

    @cached_property
    def _indices(self) -> Tensor:
        """[G] where the blocks that hold a real position stand among all."""
        lengths, n, room = self.packing.lengths, self.block_len, self.packing.room
        num_blocks = None if lengths is None else sum([-(-length // n) for length in lengths])
        if room:  # each row's last block may lack n - 1 positions
            num_blocks = (room + len(self.occupied) * (n - 1)) // n
        return indices_where(self.occupied, num_blocks, self.occupied.numel() - 1)

    @property
    def are_real(self) -> Tensor:
        """[G] bool: all, or the first of them, where there is room for more."""
        indices = self._indices
        return torch.arange(len(indices), device=indices.device) < self.occupied.sum()

    @cached_property
    def positions(self) -> Tensor:
        """[G, n, D], zero behind a history."""
        return self._held(self._cut(self.packing.unpack(self.x)))

    def _cut(self, t: Tensor) -> Tensor:
        """[B, L, ...] -> [B, ceil(L / n), n, ...], zero behind."""
        missing = -t.shape[1] % self.block_len
        padded = F.pad(t, (0, 0) * (t.ndim - 2) + (0, missing))
        return padded.view(len(t), -1, self.block_len, *t.shape[2:])

    def _held(self, t: Tensor) -> Tensor:
        """[B, ceil(L / n), ...] -> [G, ...], of the blocks that hold a real position."""
        return t.flatten(0, 1).index_select(0, self._indices)

    def at_real(self, t: Tensor) -> Tensor:
        """What stands at the real positions, as they are packed: [G, n, D] -> [N, D]."""
        return t.flatten(0, 1).index_select(0, self._places)

    @cached_property
    def _places(self) -> Tensor:
        """[N] where the real positions stand among G n."""
        if self.packed is not None:
            return self.packed.places
        real = self._held(self._cut(self.packing.valid_mask))  # [G, n]
        return indices_where(real, len(self.x), real.numel() - 1)

    def at_queries(self, t: Tensor) -> Tensor:
        """What stands where the queries are taken: [B, L, ...] -> [B, ceil(L / n), ...]."""
        return t[:, self.offset :: self.block_len]

    def keys(self) -> Tensor | None:
        """[G] hash of each block's history up to where its query is taken."""
        return self._held(self.at_queries(history_keys(self.packing.item_ids)))

    @property
    def users(self) -> Tensor:
        """[G] row of the batch that each block belongs to."""
        return self._indices // self.occupied.shape[1]

    def index(self, user: int, position: int) -> tuple[int, int]:
        """Block and offset in it of a real position."""
        earlier = int(
            self.occupied[:user].sum() + self.occupied[user, : position // self.block_len].sum()
        )
        return earlier, position % self.block_len
