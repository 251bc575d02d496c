"""Rows mapped to the space of the queries, and their largest products there.

Shapes: S rows of E numbers, mapped to D numbers, G queries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mltfr_dist.models.kernels.build import library, pointer, sizes, usable
from mltfr_dist.models.kernels.work import did_products


def map_rows(rows: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor] | None:
    """Rows [S, E] through a linear map [D, E] with a bias [D], without gradient: unit vectors
    [S, D], and what they were divided by [S, 1]; None where there is no kernel for it.
    """
    kernels = usable(rows, weight, bias)
    if kernels is None or torch.is_grad_enabled() or not rows.numel():
        return None
    rows, weight, bias = rows.contiguous(), weight.contiguous(), bias.contiguous()
    unit, lengths = rows.new_empty(len(rows), len(weight)), rows.new_empty(len(rows), 1)
    shape = sizes(len(rows), rows.shape[1], len(weight))
    kernels.map_rows(*map(pointer, (rows, weight, bias, unit, lengths)), *shape)
    did_products(unit.numel(), rows.shape[1])
    return unit, lengths


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        kernels = library()
        assert kernels is not None
        rows = rows.contiguous()
        unit, lengths = torch.empty_like(rows), rows.new_empty(len(rows), 1)
        kernels.unit_vectors(*map(pointer, (rows, unit, lengths)), *sizes(*rows.shape))
        ctx.save_for_backward(unit, lengths)
        return unit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return unit_backward(gradient, *ctx.saved_tensors)


def unit_vectors(rows: Tensor) -> Tensor:
    """``F.normalize`` of rows [S, D]."""
    if usable(rows) is None:
        return F.normalize(rows, dim=-1)
    return _Unit.apply(rows)  # type: ignore[no-untyped-call, no-any-return]


def unit_backward(gradient: Tensor, unit: Tensor, lengths: Tensor) -> Tensor:
    """From the gradient [S, D] by the ``unit`` vectors [S, D] that by the vectors that ``lengths``
    [S, 1] divided.
    """
    kernels = usable(gradient, unit, lengths)
    if kernels is None:
        along = (gradient * unit).sum(-1, keepdim=True)
        return (gradient - unit * along) / lengths
    gradient, made = gradient.contiguous(), torch.empty_like(unit)
    read = (gradient, unit, lengths)
    kernels.unit_backward(*map(pointer, (*read, made)), *sizes(*unit.shape))
    return made


def row_maxima(query: Tensor, rows: Tensor) -> Tensor | None:
    """[S], the largest product of each row [S, D] with any of the queries [G, D]; None where there
    is no kernel for it.
    """
    kernels = usable(query, rows)
    if kernels is None or not query.numel() or not rows.numel():
        return None
    query, rows = query.contiguous(), rows.contiguous()
    maxima = rows.new_empty(len(rows))
    shape = sizes(len(query), len(rows), rows.shape[1])
    kernels.row_maxima(*map(pointer, (query, rows, maxima)), *shape)
    did_products(len(query) * len(rows), rows.shape[1])
    return maxima
