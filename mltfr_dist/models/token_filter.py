"""User-guided token filtering, repaired (docs/method.md): causal, per user, with a gradient that never vanishes.

Shapes: G queries, S candidate rows of one table, V_m x D_m the table, D hidden size, K kept tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mltfr_dist.config import FilterConfig
from mltfr_dist.numerics import at_least_fp32

CHUNK_ELEMENTS = 1 << 24
"""Scores held at a time while searching (64 MiB in fp32)."""


class KeptTokens(NamedTuple):
    """What the filter keeps of one table."""

    places: Tensor | None
    """[G, K] int64, places in the candidate list, best first; None: every query keeps all candidates."""
    log_weights: Tensor
    """[G, K], log-softmax of the kept scores: added to the expert's attention logits. [1, S] where all are kept."""


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


class TokenFilter(nn.Module):
    """Scores the rows of one token table against a user query and keeps the best K."""

    def __init__(self, config: FilterConfig, num_rows: int, table_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.num_kept = config.num_kept(num_rows)
        self.projection = nn.Linear(table_dim, hidden_dim)
        nn.init.normal_(self.projection.weight, std=table_dim**-0.5)
        nn.init.zeros_(self.projection.bias)
        log_temperature = torch.tensor([math.log(config.temperature)])
        if config.learn_temperature:
            self.log_temperature = nn.Parameter(log_temperature)
        else:
            self.register_buffer("log_temperature", log_temperature, persistent=False)

    @property
    def temperature(self) -> Tensor:
        """tau_s, [1]."""
        return self.log_temperature.exp()

    def project(self, rows: Tensor) -> Tensor:
        """Table rows [S, D_m] -> unit vectors in the user space [S, D]."""
        return F.normalize(self.projection(rows), dim=-1)

    def forward(self, query: Tensor, rows: Tensor) -> KeptTokens:
        """Keep the K candidates of highest cosine for each query.

        The search runs without gradient over all candidates; only what is kept is scored again with it.

        Args:
            query: [G, D] user vectors.
            rows: [S, D_m] candidate rows.
        """
        unit_query = F.normalize(query, dim=-1)
        unit_rows = self.project(rows)
        with torch.no_grad():
            index = search(unit_query, unit_rows, self.num_kept)  # [G, K]
        kept_rows = F.embedding(index, unit_rows)  # [G, K, D]
        cosines = torch.einsum("gd,gkd->gk", unit_query, kept_rows)
        return KeptTokens(index, F.log_softmax(at_least_fp32(cosines) / at_least_fp32(self.temperature), dim=-1).to(query.dtype))


def search(unit_query: Tensor, unit_rows: Tensor, num_kept: int) -> Tensor:
    """[G, K] places of the K largest products per query, in chunks of queries so that memory is bounded."""
    chunk = max(1, CHUNK_ELEMENTS // unit_rows.shape[0])
    return torch.cat([(part @ unit_rows.T).topk(num_kept, dim=1).indices for part in torch.split(unit_query, chunk)])


def row_relevance(unit_query: Tensor, unit_rows: Tensor) -> Tensor:
    """[S] largest cosine of each row with any of the queries; -1 where there is no query."""
    best = torch.full((unit_rows.shape[0],), -1.0, device=unit_rows.device, dtype=unit_rows.dtype)
    chunk = max(1, CHUNK_ELEMENTS // unit_rows.shape[0])
    for part in torch.split(unit_query, chunk):
        if len(part):
            torch.maximum(best, (part @ unit_rows.T).amax(dim=0), out=best)
    return best
