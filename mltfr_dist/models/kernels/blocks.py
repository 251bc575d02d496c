"""Packed histories in blocks, with a mean of the past for each; see ``models/query_blocks.py``.

Shapes: B users, N real positions, n positions a block, G blocks that hold a real position, D
hidden size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mltfr_dist.models.kernels.build import library, pointer, sizes


class Blocks(NamedTuple):
    """Blocks of positions that stand one behind another, without padding between them."""

    ends: Tensor
    """[G] int64, where each block ends among the N positions."""
    places: Tensor
    """[N] int64, where each position stands among the G n that whole blocks would have."""
    block_len: int
    """n."""


class _Means(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lengths: Tensor, ends: Tensor, places: Tensor, n: int, offset: int
    ) -> Tensor:
        kernels = library()
        assert kernels is not None
        x, means = x.contiguous(), x.new_empty(len(ends), x.shape[1])
        ctx.num_real, ctx.shape = len(x), (len(lengths), x.shape[1], n, offset)
        kernels.block_means(*map(pointer, (x, lengths, means, ends, places)), *sizes(*ctx.shape))
        ctx.save_for_backward(lengths)
        return means

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_means: Tensor) -> tuple[Tensor | None, ...]:
        kernels = library()
        assert kernels is not None
        (lengths,) = ctx.saved_tensors
        of_x = of_means.new_empty(ctx.num_real, ctx.shape[1])
        read = (of_means.contiguous(), lengths)
        kernels.block_means_backward(*map(pointer, (*read, of_x)), *sizes(*ctx.shape))
        return of_x, None, None, None, None, None


def block_means(x: Tensor, lengths: Tensor, block_len: int, offset: int) -> tuple[Tensor, Blocks]:
    """Means of the past and the blocks; where :func:`usable` takes ``x``.

    Args:
        x: [N, D], row by row.
        lengths: [B] int64, positions of each row; they sum to N.
        block_len: n.
        offset: Of a block where its mean is taken: over all positions of the row up to there.

    Returns:
        [G, D], and the blocks.
    """
    of_rows = lengths.tolist()
    assert len(x) == sum(of_rows)
    num_blocks = sum([-(-length // block_len) for length in of_rows])
    blocks = Blocks(lengths.new_empty(num_blocks), lengths.new_empty(len(x)), block_len)
    means: Tensor = _Means.apply(  # type: ignore[no-untyped-call]
        x, lengths, blocks.ends, blocks.places, block_len, offset
    )
    return means, blocks
