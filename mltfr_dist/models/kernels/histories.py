"""Self-attention within histories that stand one behind another, without padding between them.

Shapes: B histories, N positions of them all, H heads of d numbers, D = H d.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mltfr_dist.models.kernels.build import library, pointer, sizes, usable
from mltfr_dist.models.kernels.work import did_products


class _Histories(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, starts: Tensor, causal: bool) -> Tensor:
        kernels = library()
        assert kernels is not None
        qkv = qkv.contiguous()
        positions, _, num_heads, head_dim = qkv.shape
        mixed = qkv.new_empty(positions, num_heads * head_dim)
        log_sums = qkv.new_empty(positions, num_heads)
        shape = (len(starts) - 1, num_heads, head_dim, int(causal))
        kernels.attend_histories(*map(pointer, (qkv, starts, mixed, log_sums)), *sizes(*shape))
        ctx.save_for_backward(qkv, starts, log_sums)
        ctx.shape = shape
        did_products(2 * _pairs(starts, causal), mixed.shape[1])
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kernels = library()
        assert kernels is not None
        qkv, starts, log_sums = ctx.saved_tensors
        of_qkv = torch.zeros_like(qkv)
        read = (gradient.contiguous(), qkv, starts, log_sums, of_qkv)
        kernels.attend_histories_backward(*map(pointer, read), *sizes(*ctx.shape))
        did_products(5 * _pairs(starts, bool(ctx.shape[-1])), gradient.shape[1])
        return of_qkv, None, None


def attend_histories(qkv: Tensor, starts: Tensor, *, causal: bool) -> Tensor | None:
    """softmax(query keys^T / sqrt d) values of each head and history.

    Args:
        qkv: [N, 3, H, d] queries, keys and values.
        starts: [B + 1] int64, positions at which histories begin, and N.
        causal: Whether a position reads those up to it alone; otherwise its whole history.

    Returns:
        [N, D]; None where there is no kernel for it.
    """
    if usable(qkv) is None or starts.device.type != "cpu":
        return None
    read: Tensor = _Histories.apply(qkv, starts, causal)  # type: ignore[no-untyped-call]
    return read


def _pairs(starts: Tensor, causal: bool) -> int:
    """Positions that are read, of all positions that read."""
    lengths = starts.diff()
    return int((lengths * (lengths + 1) // 2 if causal else lengths.square()).sum())
