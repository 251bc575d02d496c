"""Attention to kept rows where they stand, without a copy of the rows.

Shapes: G query blocks of n positions, S rows, K kept rows, H heads, D numbers of all heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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
    ) -> Tensor:
        kernels = library()
        assert kernels is not None
        query, keys, values, kept, log_weights = (
            t.contiguous() for t in (query, keys, values, kept, log_weights)
        )
        groups, positions, width = query.shape
        shape = (groups, positions, num_heads, width // num_heads, kept.shape[1])
        weights = query.new_empty(groups, num_heads, positions, kept.shape[1])
        mixed = torch.empty_like(query)
        read = (query, keys, values, kept, log_weights, mask)
        kernels.attend(*map(pointer, (*read, weights, mixed)), *sizes(*shape))
        did_products(2 * groups * positions * kept.shape[1], width)
        ctx.save_for_backward(query, keys, values, kept, weights, mask)
        ctx.shape = shape
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kernels = library()
        assert kernels is not None
        query, keys, values, kept, weights, mask = ctx.saved_tensors
        groups, positions, num_heads, head_dim, count = ctx.shape
        made = (torch.empty_like(query), torch.zeros_like(keys), torch.zeros_like(values))
        by_head = query.new_empty(groups, num_heads, count)
        read = (gradient.contiguous(), query, keys, values, kept, mask, weights)
        kernels.attend_backward(*map(pointer, (*read, *made, by_head)), *sizes(*ctx.shape))
        did_products(4 * groups * positions * count, num_heads * head_dim)
        return *made, None, by_head.sum(1), None, None


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    kept: Tensor,
    log_weights: Tensor,
    draw_mask: Callable[[tuple[int, ...]], Tensor | None],
    num_heads: int,
) -> Tensor:
    """softmax(query keys^T / sqrt(D / H) + log_weights) values of each head.

    Args:
        query: [G, n, D].
        keys: [S, D].
        values: [S, D].
        kept: [G, K] rows that each block attends to.
        log_weights: [G, K].
        draw_mask: Gives [G, H, n, K] that the weights are multiplied with; None: with 1.
        num_heads: H.

    Returns:
        [G, n, D].

    Raises:
        IndexError: ``kept`` names a row that there is not.
    """
    if not inside(kept, len(keys)):
        raise IndexError(f"rows are kept that are not among the {len(keys)} that there are")
    mask = draw_mask((len(query), num_heads, query.shape[1], kept.shape[1]))
    attended: Tensor = _Attention.apply(  # type: ignore[no-untyped-call]
        query, keys, values, kept, log_weights, mask, num_heads
    )
    return attended


def inside(indices: Tensor, count: int) -> bool:
    """Whether all are places of ``count`` rows, in the format that the kernels read."""
    if indices.dtype != torch.int64 or not indices.numel():
        return indices.dtype == torch.int64
    least, largest = torch.aminmax(indices)
    return int(least) >= 0 and int(largest) < count
