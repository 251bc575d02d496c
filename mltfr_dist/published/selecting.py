"""D1 and D3: straight-through weights of the kept tokens, normalised, and noise in evaluation.

Shapes: G queries, S candidate rows, V x D_m the table, K kept tokens, E width of an expert's
rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mltfr_dist.models.draws import GumbelNoise
from mltfr_dist.models.experts import ExpertRows
from mltfr_dist.models.noisy_search import noisy_rows
from mltfr_dist.models.placed_table import PlacedTable, WholeTable
from mltfr_dist.models.search import largest, search
from mltfr_dist.models.selectors.base import Queries, Selection
from mltfr_dist.models.selectors.user_guided import UserGuided
from mltfr_dist.numerics import at_least_fp32

NORMALISER = 1e-8
"""Added to the sum of the straight-through weights (as published)."""


@dataclass(frozen=True)
class WeightedSelection(Selection):
    """Kept rows that are multiplied by factors; the attention itself knows no weights."""

    row_weights: Tensor
    """[G, K], 1 / K in value."""

    def attended(self, adapter: nn.Module) -> ExpertRows:
        """Every query has rows of its own, for factors act before an expert's biases."""
        assert self.kept is not None
        rows = F.embedding(self.kept, adapter(self.candidates)) * self.row_weights[..., None]
        own = torch.arange(self.kept.numel(), device=rows.device).view_as(self.kept)
        return ExpertRows(rows.flatten(0, 1), own, self.log_weights)

    def weights(self) -> Tensor:
        """[G, K]."""
        return self.row_weights


def straight_through(scores: Tensor, temperature: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The kept weigh (1 - y).detach() + y of a softmax y over all candidates, normalised.

    Args:
        scores: [G, S].
        temperature: [1].
        count: K.

    Returns:
        [G, K] indices of the largest scores, best first, and their weights: 1 / K in value.
    """
    with torch.no_grad():
        kept = largest(scores, count)
    y = torch.softmax(at_least_fp32(scores) / at_least_fp32(temperature), dim=-1).gather(1, kept)
    hard = (1 - y).detach() + y
    return kept, (hard / (hard.sum(1, keepdim=True) + NORMALISER)).to(scores.dtype)


class StraightThrough(UserGuided):
    """:func:`straight_through` over all candidates: for K = 1 without gradient."""

    scales_rows = True

    def forward(self, queries: Queries, table: PlacedTable) -> Selection:
        """Search the whole table, unless there is a shortlist."""
        if self.shortlist is not None:
            return super().forward(queries, table)
        assert isinstance(table, WholeTable)
        rows = table.whole()
        row_ids = torch.arange(len(rows), device=rows.device)
        return self.select(queries, rows, row_ids, self.noise(queries.keys, row_ids))

    def select(
        self,
        queries: Queries,
        rows: Tensor,
        row_ids: Tensor,
        noise: GumbelNoise | None = None,
        kept: Tensor | None = None,
    ) -> Selection:
        """Keep K of the candidates ``rows`` [S, D_m] for each query."""
        unit_query = queries.unit
        if self.num_kept == 1 and unit_query.dtype != torch.float64:
            return self._single(unit_query, rows, row_ids, noise)
        scores = unit_query @ self.project(rows).T  # [G, S]
        if noise is not None:
            scores = scores + noise.of(slice(None)).to(scores.dtype)
        kept, weights = straight_through(scores, self.temperature, self.num_kept)
        return WeightedSelection(rows, row_ids, kept, torch.zeros_like(weights), weights)

    @torch.no_grad()
    def _single(
        self, unit_query: Tensor, rows: Tensor, row_ids: Tensor, noise: GumbelNoise | None
    ) -> Selection:
        """The weight of one token: in fp32 it is 1 to the last bit and its gradient exactly 0."""
        kept = noisy_rows(unit_query, rows, self.project, 1, noise)
        if kept is None:
            kept = search(unit_query, self.project(rows), 1, noise)
        ones = unit_query.new_ones(kept.shape)
        return WeightedSelection(rows, row_ids, kept, torch.zeros_like(ones), ones)


class NoiseInEvaluation(UserGuided):
    """Draws noise outside training too."""

    @property
    def draws_noise(self) -> bool:
        """Always."""
        return True
