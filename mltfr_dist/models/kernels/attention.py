"""Attention to kept rows where they stand, without a copy of the rows.

Shapes: G query blocks of n positions, N positions of all, S rows, K kept rows, H heads, D numbers
of all heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mltfr_dist.models.kernels.blocks import Blocks
from mltfr_dist.models.kernels.build import library, pointer, sizes
from mltfr_dist.models.kernels.work import did_products


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        kept: Tensor,
        log_weights: Tensor,
        mask: Tensor | None,
        num_heads: int,
        blocks: Blocks | None,
    ) -> Tensor:
        kernels = library()
        assert kernels is not None
        query, keys, values, kept, log_weights = (
            t.contiguous() for t in (query, keys, values, kept, log_weights)
        )
        groups, count = kept.shape
        width, (ends, positions) = query.shape[-1], _ends(query, blocks)
        shape = (groups, positions, num_heads, width // num_heads, count, keys.shape[0])
        weights = query.new_empty(groups, num_heads, positions, count)
        mixed = torch.empty_like(query)
        read = (query, ends, keys, values, kept, log_weights, mask)
        kernels.attend(*map(pointer, (*read, weights, mixed)), *sizes(*shape))
        did_products(2 * query.numel() // width * count, width)
        ctx.save_for_backward(query, keys, values, kept, weights, mask)
        ctx.shape, ctx.ends = shape, ends
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kernels = library()
        assert kernels is not None
        query, keys, values, kept, weights, mask = ctx.saved_tensors
        groups, _, num_heads, head_dim, count, _ = ctx.shape
        made = tuple(torch.empty_like(t) for t in (query, keys, values))
        by_head = query.new_empty(groups, num_heads, count)
        read = (gradient.contiguous(), query, ctx.ends, keys, values, kept, mask, weights)
        kernels.attend_backward(*map(pointer, (*read, *made, by_head)), *sizes(*ctx.shape))
        width = num_heads * head_dim
        did_products(4 * query.numel() // width * count, width)
        return *made, None, by_head.sum(1), None, None, None


def _ends(query: Tensor, blocks: Blocks | None) -> tuple[Tensor | None, int]:
    """Of blocks among all positions, None where all hold n; and n."""
    return (None, query.shape[1]) if blocks is None else (blocks.ends, blocks.block_len)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    kept: Tensor,
    log_weights: Tensor,
    mask: Tensor | None,
    num_heads: int,
    blocks: Blocks | None = None,
) -> Tensor:
    """softmax(query keys^T / sqrt(D / H) + log_weights) values of each head.

    Args:
        query: [G, n, D]; [N, D] of the positions of ``blocks``.
        keys: [S, D].
        values: [S, D].
        kept: [G, K] rows that each block attends to.
        log_weights: [G, K].
        mask: [G, H, n, K], what the weights are multiplied with; None: ones.
        num_heads: H.
        blocks: Where positions stand; None: in whole blocks.

    Returns:
        [G, n, D] or [N, D].

    Raises:
        IndexError: ``kept`` names a row that there is not.
    """
    if not inside(kept, keys.shape[0]):
        raise IndexError(f"rows are kept that are not among the {len(keys)} that there are")
    attended: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
        query, keys, values, kept, log_weights, mask, num_heads, blocks
    )
    return attended


def inside(indices: Tensor, count: int) -> bool:
    """Whether all are places of ``count`` rows, in the format that the kernels read; where there
    are kernels.
    """
    kernels = library()
    if kernels is None or indices.dtype != torch.int64:
        return False
    indices = indices.contiguous()
    return bool(kernels.inside(pointer(indices), *sizes(indices.numel(), count)))
