"""Packed histories cut into blocks, a mean of the past for each, and blocks put together again; see
``models/query_blocks.py``.

Shapes: B users, N real positions, n positions a block, G blocks that hold a real position, D
hidden size.
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
        x, dim = x.contiguous(), x.shape[1]
        num_blocks = _blocks(lengths, block_len)
        positions = x.new_empty(num_blocks, block_len, dim)
        means = x.new_empty(num_blocks, dim)
        ctx.num_real, ctx.shape = len(x), (len(lengths), dim, block_len, offset)
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
        of_x = of_means.new_empty(ctx.num_real, ctx.shape[1])
        read = (of_positions.contiguous(), of_means.contiguous(), lengths)
        kernels.cut_blocks_backward(*map(pointer, (*read, of_x)), *sizes(*ctx.shape))
        return of_x, None, None, None


class _AtReal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, blocks: Tensor, lengths: Tensor, num_real: int) -> Tensor:
        kernels = library()
        assert kernels is not None
        blocks = blocks.contiguous()
        _, block_len, dim = ctx.of_blocks = blocks.shape
        x = blocks.new_empty(num_real, dim)
        ctx.shape = (len(lengths), dim, block_len)
        kernels.join_blocks(*map(pointer, (blocks, lengths, x)), *sizes(*ctx.shape))
        ctx.save_for_backward(lengths)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_x: Tensor) -> tuple[Tensor, None, None]:
        kernels = library()
        assert kernels is not None
        (lengths,) = ctx.saved_tensors
        of_blocks = of_x.new_empty(ctx.of_blocks)
        read = (of_x.contiguous(), lengths)
        kernels.join_blocks_backward(*map(pointer, (*read, of_blocks)), *sizes(*ctx.shape))
        return of_blocks, None, None


def cut(x: Tensor, lengths: Tensor, block_len: int, offset: int) -> tuple[Tensor, Tensor]:
    """Blocks and means; where :func:`usable` takes ``x``.

    Args:
        x: [N, D], row by row.
        lengths: [B] int64, positions of each row; they sum to N.
        block_len: n.
        offset: Of a block where its mean is taken: over all positions of the row up to there.

    Returns:
        [G, n, D], zero behind a row's positions, and [G, D].
    """
    assert len(x) == int(lengths.sum())
    return _Cut.apply(x, lengths, block_len, offset)  # type: ignore[no-untyped-call, no-any-return]


def at_real(blocks: Tensor, lengths: Tensor) -> Tensor:
    """[G, n, D] -> [N, D], the ``lengths`` [B] positions of each row; where :func:`usable` takes
    ``blocks``.
    """
    assert len(blocks) == _blocks(lengths, blocks.shape[1])
    num_real = int(lengths.sum())
    return _AtReal.apply(blocks, lengths, num_real)  # type: ignore[no-untyped-call, no-any-return]


def _blocks(lengths: Tensor, block_len: int) -> int:
    """G."""
    return int(((lengths + block_len - 1) // block_len).sum())
