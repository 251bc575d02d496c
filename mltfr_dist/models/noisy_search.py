"""The best rows of a search with much noise: only few can be it, by their noise alone.

Cosines differ by 2 at most, so a row whose noise lies further below the K-th largest is not among
the K best whatever it says. Of 30,000 rows some e^2 are left: they alone are projected and scored,
in float64, so that nothing depends on how a product was divided.

Shapes: G queries, S rows of D_m columns, D hidden size, K kept rows, C >= K rows that may be among
them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mltfr_dist.models.draws import GumbelNoise, words_of
from mltfr_dist.models.kernels import noisy_candidates
from mltfr_dist.models.search import Project, best, products_at

LARGEST_REACH = 4.0
"""Gumbel units that cosines can make up for at most: beyond, e^reach rows are too many."""
TOLERANCE = 1e-4
"""By how much more than 2 computed cosines may differ."""


@torch.no_grad()
def noisy_rows(
    unit_query: Tensor, rows: Tensor, project: Project, num_kept: int, noise: GumbelNoise | None
) -> Tensor | None:
    """[G, K] indices of the ``rows`` [S, D_m] of largest cosine plus noise, best first; of equal
    ones (in fp32) the lower indices.

    ``project`` is called once. None where the noise is too small, or there is no kernel for it.

    Args:
        unit_query: [G, D] unit vectors.
        rows: [S, D_m].
        project: Computes unit vectors.
        num_kept: K.
        noise: Of all rows; None: no noise.
    """
    if noise is None or unit_query.dtype != torch.float32:
        return None
    reach = (2 + TOLERANCE) / noise.scale
    if reach > LARGEST_REACH:
        return None
    words = words_of(noise.keys, noise.row_ids)
    near = noisy_candidates(*words, num_kept, reach)
    if near is None:
        return None
    indices, counts = near
    present, inverse = torch.unique(indices, return_inverse=True)
    exact_rows = project(rows.index_select(0, present), torch.float64)  # [U, D]
    cosines = products_at(unit_query, exact_rows, inverse)
    scores = (cosines + noise.at(indices)).float()
    beyond = torch.arange(indices.shape[1]) >= counts[:, None]
    return best(scores.masked_fill(beyond, -torch.inf), indices, num_kept)[1]
