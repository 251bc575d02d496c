"""The best rows of a table for each query, the same ones however queries and rows are divided over
matrices.

A product of matrices may round otherwise in another shape, so its last bits must not decide. They
only find the rows that may be among the best; those are scored again in float64. A GPU that is fast
in float64 scores all rows so, for which it need not be asked which ones are near. Order: the score
rounded to float32, then the lower row number.

Shapes: G queries, S rows of D_m columns, D hidden size, K kept rows, C >= K rows that may be among
them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from mltfr_dist.models.draws import GumbelNoise
from mltfr_dist.models.kernels import nearest
from mltfr_dist.numerics import in_order, is_fast_in_float64, top_of

CACHED_ELEMENTS = 1 << 21
"""Scores held at a time on a CPU (8 MiB in fp32), so that they stay in its cache."""
CHUNK_ELEMENTS = 1 << 24
"""Scores held at a time on a GPU (64 MiB in fp32)."""
MARGIN = 16
"""Rows looked at beyond the K best, at least; more where these do not tell the best apart."""
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.0**-6}
"""By how much two computed cosines may differ at least, so that the larger is the larger one."""


class Project(Protocol):
    """Rows [S, D_m] to unit vectors in the user space [S, D], computed in ``dtype`` (None: that of
    the parameters).
    """

    def __call__(self, rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Project."""


def queries_at_once(num_rows: int, device: torch.device) -> int:
    """Queries whose scores of ``num_rows`` rows are held at a time."""
    return max(1, (CACHED_ELEMENTS if device.type == "cpu" else CHUNK_ELEMENTS) // num_rows)


def best(scores: Tensor, ids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` of highest score of each row of ``scores`` and ``ids`` [G, C], best first; of
    equal ones the lower ids.
    """
    by_id = ids.argsort(dim=1)
    scores, ids = scores.gather(1, by_id), ids.gather(1, by_id)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
    return scores.gather(1, order), ids.gather(1, order)


def search(
    unit_query: Tensor, unit_rows: Tensor, num_kept: int, noise: GumbelNoise | None = None
) -> Tensor:
    """[G, K] indices of the K largest products (plus noise) per query, of equal ones the lower
    indices.

    In fp32 on a CPU near-ties are told apart in float64; elsewhere products count as computed.
    """
    by_kernel = nearest(unit_query, unit_rows, num_kept) if noise is None else None
    if by_kernel is not None:
        return by_kernel[1]
    on_cpu = unit_query.device.type == "cpu"
    if not on_cpu and unit_query.dtype != torch.float64:
        return _top(unit_query, unit_rows, num_kept, noise, in_order)[1]
    settled = on_cpu and unit_query.dtype == torch.float32
    tolerance = TOLERANCE[torch.float32] if settled else 0.0

    def exact(doubtful: Tensor, indices: Tensor) -> Tensor:
        return products_at(unit_query[doubtful], unit_rows.double(), indices)

    top = _best_of(unit_query, unit_rows, noise)
    near = _separated(top, len(unit_rows), num_kept, tolerance, margin=4 if settled else 1)
    if not settled:
        return best(*near, num_kept)[1]
    return _ordered(*near, num_kept, tolerance, exact, noise)


def largest(scores: Tensor, count: int) -> Tensor:
    """[G, count] indices of the largest of ``scores`` [G, S], best first; of equal ones the lower
    indices.
    """
    if scores.device.type != "cpu" and scores.dtype != torch.float64:
        return in_order(scores, count)[1]
    separated = _separated(
        lambda width: top_of(scores, width), scores.shape[1], count, 0.0, margin=1
    )
    return best(*separated, count)[1]


def search_rows(
    query: Tensor, rows: Tensor, project: Project, num_kept: int, noise: GumbelNoise | None = None
) -> tuple[Tensor, Tensor]:
    """Scores (fp32) and indices [G, K] of the K rows of highest cosine (plus noise), in the order
    stated above.

    ``project`` is called twice (once where float64 is fast), whatever there is to find: it may
    gather sharded parameters.
    """
    num_kept = min(num_kept, len(rows))
    if is_fast_in_float64(query.device):
        return _in_float64(query, rows, project, num_kept, noise)
    _, indices = _near(query, rows, project, num_kept, noise)
    scores = _cosines(query, rows, project, indices)
    if noise is not None:
        scores = scores + noise.at(indices)
    return best(scores.float(), indices, num_kept)


def nearest_rows(
    query: Tensor, rows: Tensor, project: Project, num_kept: int, noise: GumbelNoise | None = None
) -> Tensor:
    """The indices of :func:`search_rows`: float64 only for queries whose best rows do not come
    apart without.
    """
    num_kept = min(num_kept, len(rows))
    if is_fast_in_float64(query.device):
        return _in_float64(query, rows, project, num_kept, noise)[1]

    def exact(doubtful: Tensor, indices: Tensor) -> Tensor:
        return _cosines(query[doubtful], rows, project, indices)

    near = _near(query, rows, project, num_kept, noise)
    return _ordered(*near, num_kept, TOLERANCE[query.dtype], exact, noise)


def _in_float64(
    query: Tensor, rows: Tensor, project: Project, num_kept: int, noise: GumbelNoise | None
) -> tuple[Tensor, Tensor]:
    """Scores (fp32) and indices [G, K] of the best rows, all of them scored in float64."""
    unit_query = F.normalize(query.double(), dim=-1)
    unit_rows = project(rows, torch.float64)

    def choose(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
        rounded = scores.float()
        indices = in_order(rounded, count)[1]
        return rounded.gather(1, indices), indices

    return _top(unit_query, unit_rows, num_kept, noise, choose)


def _near(
    query: Tensor, rows: Tensor, project: Project, num_kept: int, noise: GumbelNoise | None
) -> tuple[Tensor, Tensor]:
    """Computed scores and indices [G, C] of the rows that may be among the best, best first."""
    top = _best_of(F.normalize(query, dim=-1), project(rows), noise)
    margin = max(4 if query.dtype == torch.float32 else MARGIN, num_kept // 4)
    return _separated(top, len(rows), num_kept, TOLERANCE[query.dtype], margin)


def _cosines(query: Tensor, rows: Tensor, project: Project, indices: Tensor) -> Tensor:
    """[G, C] in float64, of each query [G, D] with the rows at ``indices``."""
    present, inverse = torch.unique(indices, return_inverse=True)
    exact_rows = project(rows[present.to(rows.device)], torch.float64)  # [U, D]
    return products_at(F.normalize(query.double(), dim=-1), exact_rows, inverse)


def products_at(query: Tensor, rows: Tensor, indices: Tensor) -> Tensor:
    """[G, C] products in float64 of each query [G, D] with the ``rows`` [S, D] at ``indices``."""
    chunk = queries_at_once(2 * rows.shape[1] * indices.shape[1], indices.device)
    products = [
        torch.einsum("gd,gcd->gc", q.double(), F.embedding(p, rows))
        for q, p in zip(torch.split(query, chunk), torch.split(indices, chunk), strict=True)
    ]
    return torch.cat(products)


def _ordered(
    scores: Tensor,
    indices: Tensor,
    num_kept: int,
    tolerance: float,
    exact: Callable[[Tensor, Tensor], Tensor],
    noise: GumbelNoise | None,
) -> Tensor:
    """[G, K] the best of ``indices`` [G, C], given best first by computed ``scores``.

    ``exact`` scores some queries and their indices again, without noise: those of which two
    neighbours differ by no more than ``tolerance``. It is called once, maybe for no query.
    """
    near = -scores.diff(dim=1)[:, :num_kept] <= tolerance
    doubtful = near.any(dim=1).nonzero()[:, 0]
    some = indices[doubtful]
    again = exact(doubtful, some)
    if noise is not None:
        again = again + noise._replace(keys=noise.keys[doubtful]).at(some)
    kept = indices[:, :num_kept].contiguous()
    kept[doubtful] = best(again.float(), some, num_kept)[1]
    return kept


def _separated(
    top: Callable[[int], tuple[Tensor, Tensor]],
    num_rows: int,
    num_kept: int,
    tolerance: float,
    margin: int,
) -> tuple[Tensor, Tensor]:
    """Scores and indices [G, C] of all rows that may be among the best K, where a difference may
    err by ``tolerance``.

    ``top`` gives the [G, n] largest of the ``num_rows`` scores, and their indices; at first it is
    asked for ``margin`` more than K.
    """
    width = min(num_rows, num_kept + margin)
    while True:
        scores, indices = top(width)
        clear = scores[:, num_kept - 1] - scores[:, -1] > tolerance
        if width == num_rows or bool(clear.all()):
            return scores, indices
        width = min(num_rows, 2 * width)


def _best_of(
    unit_query: Tensor, unit_rows: Tensor, noise: GumbelNoise | None
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """What gives the [G, n] largest products (plus noise) and their indices, best first."""

    def top(count: int) -> tuple[Tensor, Tensor]:
        by_kernel = nearest(unit_query, unit_rows, count) if noise is None else None
        return _top(unit_query, unit_rows, count, noise) if by_kernel is None else by_kernel

    return top


@torch.no_grad()
def _top(
    unit_query: Tensor,
    unit_rows: Tensor,
    count: int,
    noise: GumbelNoise | None,
    choose: Callable[[Tensor, int], tuple[Tensor, Tensor]] = top_of,
) -> tuple[Tensor, Tensor]:
    """[G, count] largest products (plus noise) and their indices, in chunks of queries so that
    memory is bounded.
    """
    chunk = queries_at_once(len(unit_rows), unit_rows.device)
    kept = unit_query.new_empty(min(chunk, len(unit_query)), len(unit_rows))
    values, indices = [], []
    for start in range(
        0, max(1, len(unit_query)), chunk
    ):  # once where there is no query, for the shape
        queries = unit_query[start : start + chunk]
        scores = torch.mm(queries, unit_rows.T, out=kept[: len(queries)])
        if noise is not None:
            scores += noise.of(slice(start, start + chunk)).to(scores.dtype)
        top = choose(scores, count)
        values.append(top[0])
        indices.append(top[1])
    return torch.cat(values), torch.cat(indices)
