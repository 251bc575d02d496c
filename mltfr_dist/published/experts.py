"""D4 and D14: rows of a whole batch, experts that read their own table's rows, and a consensus
over equal widths.

Shapes: G query blocks, K kept tokens, S rows of an expert, E their width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mltfr_dist.config import ExpertConfig
from mltfr_dist.models.experts import ExpertCore, ExpertRows, Experts
from mltfr_dist.models.router import Router
from mltfr_dist.numerics import at_least_fp32


def own_row_experts(config: ExpertConfig, hidden_dim: int, table_dims: Sequence[int]) -> Experts:
    """Experts that read rows as they are and start apart, so that only those of equal width can be
    merged.
    """
    cores = nn.ModuleList(ExpertCore(config, hidden_dim, width) for width in table_dims)
    return Experts(nn.ModuleList(nn.Identity() for _ in table_dims), cores)


def pooled(attended: ExpertRows) -> ExpertRows:
    """The same rows for the whole batch: what any query keeps, as often as it is kept.

    A row that many queries keep is held once: in a softmax, weights of equal rows add up.
    """
    if attended.kept is None:
        return attended
    present, inverse = torch.unique(attended.kept, return_inverse=True)
    weights = at_least_fp32(attended.log_weights).exp()
    total = weights.new_zeros(len(present)).index_add(0, inverse.flatten(), weights.flatten())
    log_weights = (
        total.clamp(min=torch.finfo(total.dtype).tiny).log().to(attended.log_weights.dtype)
    )
    return ExpertRows(F.embedding(present, attended.rows), None, log_weights[None])


def mean_rows(attended: list[ExpertRows]) -> list[ExpertRows]:
    """The k-th kept row averaged over tables, for each k: what the published consensus expert
    attends to.

    Args:
        attended: Of tables of equal width that keep equally many rows.
    """
    stacked = torch.stack([m.log_weights for m in attended])
    log_weights = stacked.logsumexp(0) - math.log(len(attended))
    if attended[0].kept is None:
        return [ExpertRows(torch.stack([m.rows for m in attended]).mean(0), None, log_weights)]
    gathered = [F.embedding(m.kept, m.rows) for m in attended if m.kept is not None]
    rows = torch.stack(gathered).mean(0)  # [G, K, E]
    kept = torch.arange(rows.shape[0] * rows.shape[1], device=rows.device).view(rows.shape[:2])
    return [ExpertRows(rows.flatten(0, 1), kept, log_weights)]


class DoubleSoftmax(Router):
    """D10: a second softmax over the weights of a dense gate."""

    def weights(self, x: Tensor) -> Tensor:
        """[G, n, D] -> [G, n, E]."""
        return torch.softmax(super().weights(x), dim=-1)
