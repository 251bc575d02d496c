"""Positions cut into blocks that share a query.

Shapes: B users, L positions, n positions a block, G blocks that hold a real position, D hidden size.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from mltfr_dist.models.draws import history_keys


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
    """A batch in blocks of n positions; a block's query is the prefix mean at its first one, and so causal for all."""

    positions: Tensor
    """[G, n, D]."""
    queries: Tensor
    """[G, D]."""
    occupied: Tensor
    """[B, ceil(L / n)], which blocks hold a real position."""
    real: Tensor
    """[G, n], which of their positions are real."""

    def __init__(self, x: Tensor, valid_mask: Tensor, block_len: int) -> None:
        """Args: x: [B, L, D] input embeddings; valid_mask: [B, L]; block_len: n."""
        self.valid_mask, self.block_len = valid_mask, block_len
        self.occupied = self._cut(valid_mask)[..., 0]  # sequences start at 0 and have no gaps
        self.positions = self._cut(x)[self.occupied]
        self.queries = self.at_queries(prefix_mean(x, valid_mask))[self.occupied]
        self.real = self._cut(valid_mask)[self.occupied]

    def _cut(self, t: Tensor) -> Tensor:
        """[B, L, ...] -> [B, ceil(L / n), n, ...], zero behind."""
        missing = -t.shape[1] % self.block_len
        padded = F.pad(t, (0, 0) * (t.ndim - 2) + (0, missing))
        return padded.view(len(t), -1, self.block_len, *t.shape[2:])

    def at_queries(self, t: Tensor) -> Tensor:
        """What stands where the queries are taken: [B, L, ...] -> [B, ceil(L / n), ...]."""
        return t[:, :: self.block_len]

    def keys(self, item_ids: Tensor | None) -> Tensor | None:
        """[G] hash of each block's history [B, L] up to where its query is taken; None where none is given."""
        return None if item_ids is None else self.at_queries(history_keys(item_ids))[self.occupied]

    @property
    def users(self) -> Tensor:
        """[G] row of the batch that each block belongs to."""
        return self.occupied.nonzero()[:, 0]

    def spread(self, output: Tensor) -> Tensor:
        """[G, n, D] -> [B, L, D], zero at padding."""
        length = self.valid_mask.shape[1]
        whole = output.new_zeros(*self.occupied.shape, *output.shape[1:])  # [B, L/n, n, D]
        whole[self.occupied] = output
        return whole.flatten(1, 2)[:, :length] * self.valid_mask[..., None]

    def index(self, user: int, position: int) -> tuple[int, int]:
        """Block and place in it of a real position."""
        earlier = int(
            self.occupied[:user].sum() + self.occupied[user, : position // self.block_len].sum()
        )
        return earlier, position % self.block_len
