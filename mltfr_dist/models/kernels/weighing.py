"""How much each row that a query keeps weighs, without a copy of the rows.

Shapes: G queries, S rows of D numbers, K kept rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mltfr_dist.models.kernels.attention import inside
from mltfr_dist.models.kernels.build import library, pointer, sizes, usable
from mltfr_dist.models.kernels.work import did_products
from mltfr_dist.numerics import at_least_fp32


class _Weighing(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        rows: Tensor,
        kept: Tensor,
        temperature: Tensor,
        noise: Tensor | None,
    ) -> Tensor:
        kernels = library()
        assert kernels is not None
        query, rows, kept = query.contiguous(), rows.contiguous(), kept.contiguous()
        noise = None if noise is None else noise.contiguous()
        log_weights = query.new_empty(kept.shape)
        read = (query, rows, kept, noise, temperature)
        shape = (*query.shape, kept.shape[1], rows.shape[0])
        kernels.weigh_kept(*map(pointer, (*read, log_weights)), *sizes(*shape))
        did_products(kept.numel(), query.shape[1])
        ctx.save_for_backward(query, rows, kept, temperature, log_weights)
        ctx.shape = shape
        return log_weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kernels = library()
        assert kernels is not None
        query, rows, kept, temperature, log_weights = ctx.saved_tensors
        of_products = torch.empty_like(log_weights)
        made = tuple(torch.empty_like(t) for t in (query, rows, temperature))
        read = (gradient.contiguous(), query, rows, kept, temperature, log_weights)
        kernels.weigh_kept_backward(*map(pointer, (*read, of_products, *made)), *sizes(*ctx.shape))
        did_products(2 * kept.numel(), query.shape[1])
        of_query, of_rows, of_temperature = made
        return of_query, of_rows, None, of_temperature, None


def weigh_kept(
    query: Tensor, rows: Tensor, kept: Tensor, temperature: Tensor, noise: Tensor | None = None
) -> Tensor:
    """Log-softmax [G, K] of (query . row + noise) / temperature over the rows that a query keeps.

    Args:
        query: [G, D].
        rows: [S, D].
        kept: [G, K] rows that each query keeps.
        temperature: [1].
        noise: [G, K], without gradient; None: none.
    """
    usual = usable(query, rows, temperature, *([] if noise is None else [noise])) is not None
    if usual and inside(kept, rows.shape[0]):
        return _Weighing.apply(query, rows, kept, temperature, noise)  # type: ignore[no-untyped-call, no-any-return]
    scores = torch.einsum("gd,gkd->gk", query, F.embedding(kept, rows))  # says what is wrong
    if noise is not None:
        scores = scores + noise
    scores = at_least_fp32(scores) / at_least_fp32(temperature)
    return F.log_softmax(scores, dim=-1).to(query.dtype)


def used_rows(kept: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """[U], ascending: which of ``count`` rows any query keeps; and ``kept`` [G, K] as indices into
    them. None where there is no kernel for it.
    """
    kernels = usable()
    if kernels is None or not kept.is_cpu or kept.dtype != torch.int64:
        return None
    kept, places = kept.contiguous(), kept.new_empty(count)
    used, renumbered = kept.new_empty(min(count, kept.numel())), torch.empty_like(kept)
    made = map(pointer, (kept, places, used, renumbered))
    found = kernels.used_rows(*made, *sizes(kept.numel(), count))
    return None if found < 0 else (used[:found], renumbered)
