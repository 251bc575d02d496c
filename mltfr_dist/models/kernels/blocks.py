"""Histories cut into blocks, a mean of the past for each, and blocks put together again; see
``models/query_blocks.py``.

Shapes: B users, L positions, n positions a block, G blocks that hold a real position, D hidden
size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mltfr_dist.models.kernels.build import library, pointer, sizes


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lengths: Tensor, block_len: int, offset: int
    ) -> tuple[Tensor, Tensor]:
        kernels = library()
        assert kernels is not None
        x, dim = x.contiguous(), x.shape[2]
        num_blocks = _blocks(lengths, block_len)
        positions = x.new_empty(num_blocks, block_len, dim)
        means = x.new_empty(num_blocks, dim)
        ctx.shape = (*x.shape, block_len, offset)
        kernels.cut_blocks(*map(pointer, (x, lengths, positions, means)), *sizes(*ctx.shape))
        ctx.save_for_backward(lengths)
        return positions, means

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_positions: Tensor, of_means: Tensor
    ) -> tuple[Tensor, None, None, None]:
        kernels = library()
        assert kernels is not None
        (lengths,) = ctx.saved_tensors
        of_x = of_means.new_empty(ctx.shape[:3])
        read = (of_positions.contiguous(), of_means.contiguous(), lengths)
        kernels.cut_blocks_backward(*map(pointer, (*read, of_x)), *sizes(*ctx.shape))
        return of_x, None, None, None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, blocks: Tensor, lengths: Tensor, length: int) -> Tensor:
        kernels = library()
        assert kernels is not None
        blocks = blocks.contiguous()
        ctx.shape = (len(lengths), length, blocks.shape[2], blocks.shape[1])
        x = blocks.new_empty(ctx.shape[:3])
        kernels.spread_blocks(*map(pointer, (blocks, lengths, x)), *sizes(*ctx.shape))
        ctx.save_for_backward(lengths)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_x: Tensor) -> tuple[Tensor, None, None]:
        kernels = library()
        assert kernels is not None
        (lengths,) = ctx.saved_tensors
        *_, dim, block_len = ctx.shape
        of_blocks = of_x.new_empty(_blocks(lengths, block_len), block_len, dim)
        read = (of_x.contiguous(), lengths)
        kernels.spread_blocks_backward(*map(pointer, (*read, of_blocks)), *sizes(*ctx.shape))
        return of_blocks, None, None


def cut(x: Tensor, lengths: Tensor, block_len: int, offset: int) -> tuple[Tensor, Tensor]:
    """Blocks and means; where :func:`usable` takes ``x``.

    Args:
        x: [B, L, D].
        lengths: [B] int64, real positions of each row, at most L.
        block_len: n.
        offset: Of a block where its mean is taken: over all real positions up to there.

    Returns:
        [G, n, D], zero behind column L, and [G, D].
    """
    return _Cut.apply(x, lengths, block_len, offset)  # type: ignore[no-untyped-call, no-any-return]


def spread(blocks: Tensor, lengths: Tensor, length: int) -> Tensor:
    """[G, n, D] -> [B, L, D], zero behind the ``lengths`` [B] real positions of each row; where
    :func:`usable` takes ``blocks``.
    """
    assert len(blocks) == _blocks(lengths, blocks.shape[1])
    return _Spread.apply(blocks, lengths, length)  # type: ignore[no-untyped-call, no-any-return]


def _blocks(lengths: Tensor, block_len: int) -> int:
    """G."""
    return int(((lengths + block_len - 1) // block_len).sum())
