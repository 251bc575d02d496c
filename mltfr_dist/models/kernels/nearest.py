"""The rows of largest product with each query, without a matrix of all products.

Shapes: G queries, S rows, D numbers of each, K rows sought.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mltfr_dist.models.kernels.build import pointer, sizes, usable
from mltfr_dist.models.kernels.work import did_products

SOUGHT = 256
"""Rows sought at most: beyond, candidates are too many to be few."""
WIDTH = 256
"""Numbers of a row at most: beyond, the bound on rounding is too wide to tell rows apart."""
QUERIES = 32
"""Queries at least: rounding the rows costs as much as searching them for as many."""


def nearest(query: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor] | None:
    """Scores (fp32) and indices [G, K] of the ``count`` rows [S, D] of largest product with each
    query [G, D].

    Best first: products are formed in float64 and rounded to fp32; of equal ones the lower indices.
    None where there is no kernel for it.
    """
    kernels = usable(query, rows)
    if kernels is None or not _suits(query, rows) or not 0 < count <= min(SOUGHT, len(rows)):
        return None
    query, rows = query.contiguous(), rows.contiguous()
    scores = query.new_empty(len(query), count)
    indices = torch.empty(scores.shape, dtype=torch.int64)
    read = map(pointer, (query, rows, scores, indices))
    failed = kernels.nearest(*read, *sizes(len(query), len(rows), rows.shape[1], count))
    if failed:
        return None
    did_products(len(query) * len(rows), rows.shape[1])
    return scores, indices


def largest_products(query: Tensor, rows: Tensor) -> tuple[Tensor, float] | None:
    """For each row [S, D] a bound from below [S] of its largest product with any query [G, D], and
    how far that may lie above it at most.

    None where there is no kernel for it.
    """
    kernels = usable(query, rows)
    if kernels is None or not _suits(query, rows):
        return None
    query, rows = query.contiguous(), rows.contiguous()
    bounds, error = query.new_empty(len(rows)), query.new_empty(1)
    read = map(pointer, (query, rows, bounds, error))
    failed = kernels.largest_products(*read, *sizes(len(query), len(rows), rows.shape[1]))
    if failed:
        return None
    did_products(len(query) * len(rows), rows.shape[1])
    return bounds, float(error)


def _suits(query: Tensor, rows: Tensor) -> bool:
    return len(query) >= QUERIES and 0 < rows.shape[1] <= WIDTH and len(rows) > 0
