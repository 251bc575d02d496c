"""Rows mapped to the space of the queries, and their largest products there.

Shapes: S rows of E numbers, mapped to D numbers, G queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mltfr_dist.models.kernels.build import pointer, sizes, usable
from mltfr_dist.models.kernels.work import did_products


def map_rows(rows: Tensor, weight: Tensor, bias: Tensor, normalised: bool) -> Tensor | None:
    """Rows [S, E] through a linear map [D, E] with a bias [D], without gradient -> [S, D], unit
    vectors if ``normalised``; None where there is no kernel for it.
    """
    kernels = usable(rows, weight, bias)
    if kernels is None or torch.is_grad_enabled() or not rows.numel():
        return None
    rows, weight, bias = rows.contiguous(), weight.contiguous(), bias.contiguous()
    mapped = rows.new_empty(len(rows), len(weight))
    shape = sizes(len(rows), rows.shape[1], len(weight), int(normalised))
    kernels.map_rows(*map(pointer, (rows, weight, bias, mapped)), *shape)
    did_products(mapped.numel(), rows.shape[1])
    return mapped


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
