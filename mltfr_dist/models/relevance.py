"""How near each row of a table is to any query: what a shortlist is chosen by.

Shapes: G queries, S rows of D_m columns, D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mltfr_dist.models.kernels import largest_products, row_maxima
from mltfr_dist.models.search import TOLERANCE, Project, queries_at_once
from mltfr_dist.numerics import kth_largest


@torch.no_grad()
def row_relevance(
    query: Tensor,
    rows: Tensor,
    project: Project,
    dtype: torch.dtype | None = None,
    needed: int | None = None,
) -> Tensor:
    """[S] fp32, largest cosine of each row with any of the queries [G, D]; -1 where there is no
    query.

    Args:
        query: [G, D].
        rows: [S, D_m].
        project: Computes unit vectors.
        dtype: In which it does; None: that of the parameters.
        needed: How many of the highest are wanted; what cannot be among them, or within the
            tolerance of the last, may be given lower than it is. None: all.
    """
    unit_rows = project(rows, dtype)
    unit_query = F.normalize(query.to(unit_rows.dtype), dim=-1)
    bounds = None if needed is None else largest_products(unit_query, unit_rows)
    if bounds is None or needed is None:
        return _largest_cosines(unit_query, unit_rows).float()
    cosines, error = bounds
    needed = min(needed, len(cosines))
    first = cosines.topk(min(2 * needed, len(cosines)), sorted=False).indices
    cosines.index_copy_(0, first, _largest_cosines(unit_query, unit_rows[first]))
    # What the first reach bounds the last that is needed, and few others can reach that.
    last = kth_largest(cosines, needed) - 4 * TOLERANCE[torch.float32]
    near = (cosines + error >= last).index_fill_(0, first, False).nonzero()[:, 0]
    cosines.index_copy_(0, near, _largest_cosines(unit_query, unit_rows[near]))
    return cosines


def _largest_cosines(unit_query: Tensor, unit_rows: Tensor) -> Tensor:
    """[S] largest product of each row with any query; -1 where there is none."""
    by_kernel = row_maxima(unit_query, unit_rows)
    if by_kernel is not None:
        return by_kernel
    cosines = unit_rows.new_full((len(unit_rows),), -1.0)
    chunk = queries_at_once(max(1, len(unit_rows)), unit_rows.device)
    kept = unit_query.new_empty(min(chunk, len(unit_query)), len(unit_rows))
    for queries in torch.split(unit_query, chunk):
        if len(queries):
            scores = torch.mm(queries, unit_rows.T, out=kept[: len(queries)])
            torch.maximum(cosines, scores.amax(dim=0), out=cosines)
    return cosines
