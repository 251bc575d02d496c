"""User-guided token filtering (docs/method.md).

By default the kept tokens have soft weights, so that a gradient always reaches the filter; the published straight-through
weights are an option.

Shapes: G queries, S candidate rows of one table, V_m x D_m the table, D hidden size, K kept tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mltfr_dist.config import FilterConfig
from mltfr_dist.models.draws import LARGEST, GumbelNoise
from mltfr_dist.models.search import largest, search
from mltfr_dist.numerics import at_least_fp32

PROJECTED_ROWS = 4096
"""Rows projected at a time, so that rows of another device or format are never all copied."""
NORMALISER = 1e-8
"""Added to the sum of the straight-through weights (as published)."""


class KeptTokens(NamedTuple):
    """What the filter keeps of one table."""

    places: Tensor | None
    """[G, K] int64, places in the candidate list, best first; None: every query keeps all candidates."""
    log_weights: Tensor
    """[G, K], log-softmax of the kept scores: added to the expert's attention logits. [1, S] where all are kept."""
    row_weights: Tensor | None = None
    """[G, K], factors of the kept rows themselves (straight-through weights, 1 / K in value); None: rows as they are."""


def prefix_mean(x: Tensor, valid_mask: Tensor) -> Tensor:
    """Mean of x over each position's past, itself included.

    Args:
        x: [B, L, D].
        valid_mask: [B, L] bool.

    Returns:
        [B, L, D]; position t depends on positions <= t alone.
    """
    counts = valid_mask.cumsum(1).clamp(min=1)[..., None]
    return (x * valid_mask[..., None]).cumsum(1) / counts


class Projection(nn.Linear):
    """A linear map that is computed in any format, from rows of any device; rows are first brought to the parameters' format."""

    def forward(self, rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[S, D_in] -> [S, D_out] in ``dtype`` (None: that of the parameters)."""
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return torch.cat(
            [
                F.linear(part.to(self.weight).to(weight), weight, bias)
                for part in torch.split(rows, PROJECTED_ROWS)
            ]
        )


class TokenFilter(nn.Module):
    """Scores the rows of one token table against a user query and keeps the best K."""

    def __init__(
        self, config: FilterConfig, num_rows: int, table_dim: int, hidden_dim: int
    ) -> None:
        super().__init__()
        self.num_kept, self.weights = config.num_kept(num_rows), config.weights
        self.projection = Projection(table_dim, hidden_dim)
        nn.init.normal_(self.projection.weight, std=table_dim**-0.5)
        nn.init.zeros_(self.projection.bias)
        log_temperature = torch.tensor([math.log(config.temperature)])
        if config.learn_temperature:
            self.log_temperature = nn.Parameter(log_temperature)
        else:
            self.register_buffer("log_temperature", log_temperature, persistent=False)
        if config.noise:  # the salt follows from the run's seed, as all that is drawn here does
            self.register_buffer("salt", torch.randint(LARGEST, (1,)))

    @property
    def temperature(self) -> Tensor:
        """tau_s, [1]."""
        return self.log_temperature.exp()

    def project(self, rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Table rows [S, D_m] -> unit vectors in the user space [S, D], computed in ``dtype``."""
        return F.normalize(self.projection(rows, dtype), dim=-1)

    def forward(
        self,
        query: Tensor,
        rows: Tensor,
        noise: GumbelNoise | None = None,
        places: Tensor | None = None,
    ) -> KeptTokens:
        """Keep the K candidates of highest score (cosine + noise) / tau_s for each query.

        Args:
            query: [G, D] user vectors.
            rows: [S, D_m] candidate rows.
            noise: Added to the cosines.
            places: [G, K] those candidates, where a search has found them before.
        """
        unit_query = F.normalize(query, dim=-1)
        if (
            self.weights == "straight_through"
            and self.num_kept == 1
            and query.dtype != torch.float64
        ):
            return self._single(unit_query, rows, noise)
        unit_rows = self.project(rows)
        if self.weights == "straight_through":
            return self._straight_through(unit_query @ unit_rows.T, noise)
        if places is None:
            with torch.no_grad():
                places = search(unit_query, unit_rows, self.num_kept, noise)
        # The search ran without gradient over all candidates; only what is kept is scored again with it.
        scores = torch.einsum("gd,gkd->gk", unit_query, F.embedding(places, unit_rows))
        if noise is not None:
            scores = scores + noise.at(places).to(scores.dtype)
        return KeptTokens(
            places,
            F.log_softmax(at_least_fp32(scores) / at_least_fp32(self.temperature), dim=-1).to(
                query.dtype
            ),
        )

    @torch.no_grad()
    def _single(self, unit_query: Tensor, rows: Tensor, noise: GumbelNoise | None) -> KeptTokens:
        """The straight-through weight of one token: in fp32 it is 1 to the last bit and its gradient exactly 0."""
        index = search(unit_query, self.project(rows), 1, noise)
        return KeptTokens(
            index, unit_query.new_zeros(index.shape), unit_query.new_ones(index.shape)
        )

    def _straight_through(self, scores: Tensor, noise: GumbelNoise | None) -> KeptTokens:
        """Published: a softmax over all candidates [G, S], of which the kept weigh (1 - y).detach() + y, normalised."""
        if noise is not None:
            scores = scores + noise.part(slice(None)).to(scores.dtype)
        with torch.no_grad():
            index = largest(scores, self.num_kept)
        y = torch.softmax(at_least_fp32(scores) / at_least_fp32(self.temperature), dim=-1).gather(
            1, index
        )  # [G, K]
        hard = (1 - y).detach() + y
        row_weights = (hard / (hard.sum(1, keepdim=True) + NORMALISER)).to(scores.dtype)
        return KeptTokens(index, torch.zeros_like(row_weights), row_weights)
