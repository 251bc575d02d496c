"""Other ways to choose what a table contributes than the user-guided filter: controls, and the published alternatives.

Shapes: G query blocks, V rows and D_m columns of a table, S candidate rows, K kept tokens, P prototypes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mltfr_dist.models.draws import LARGEST, STEP, mix
from mltfr_dist.models.table_rows import TableRows
from mltfr_dist.models.token_filter import KeptTokens


class Selection(NamedTuple):
    """What one table contributes to a batch."""

    rows: Tensor
    """[S, D_m] candidate rows."""
    row_ids: Tensor
    """[S] their numbers in the table (of prototypes: their own)."""
    kept: KeptTokens


class RandomTokens(nn.Module):
    """K rows drawn uniformly and independently (a row may come twice) for each query block, weighed alike.

    The draw is a function of the history up to the block's first position, so a user's tokens are the same alone, in any
    batch and in every evaluation, and no future item shows. Its salt belongs to the state; it follows from the run's seed.
    """

    salt: Tensor

    def __init__(self, num_kept: int) -> None:
        super().__init__()
        self.num_kept = num_kept
        self.register_buffer("salt", torch.randint(LARGEST, (1,)))

    def forward(self, keys: Tensor, table: TableRows) -> Selection:
        """Keys [G] of the histories and the table -> the batch's rows, and which each query keeps."""
        counters = torch.arange(1, self.num_kept + 1, device=keys.device) * STEP
        drawn = (
            mix(mix(keys ^ self.salt)[:, None] + counters) & LARGEST
        ) % table.num_rows  # [G, K]
        row_ids, places = torch.unique(drawn, return_inverse=True)
        rows = table.take(row_ids)
        return Selection(
            rows, row_ids, KeptTokens(places, rows.new_full(places.shape, -math.log(self.num_kept)))
        )


class AllRows(nn.Module):
    """No choice: every query attends to all rows, weighed alike."""

    def forward(self, keys: Tensor, table: TableRows) -> Selection:
        """The table's rows [V, D_m] for all."""
        rows = table.whole()
        return Selection(rows, torch.arange(len(rows), device=rows.device), kept_by_all(rows))


class Prototypes(nn.Module):
    """A two-layer perceptron over the vocabulary axis maps V rows to P learned rows, which every query attends to."""

    def __init__(self, num_rows: int, num_prototypes: int) -> None:
        super().__init__()
        self.inner = nn.Linear(num_rows, num_prototypes)
        self.outer = nn.Linear(num_prototypes, num_prototypes)
        for linear in (self.inner, self.outer):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)

    def forward(self, keys: Tensor, table: TableRows) -> Selection:
        """[V, D_m] -> [P, D_m]."""
        rows = self.outer(F.gelu(self.inner(table.whole().T))).T  # [P, D_m]
        return Selection(rows, torch.arange(len(rows), device=rows.device), kept_by_all(rows))


def kept_by_all(rows: Tensor) -> KeptTokens:
    """All rows [S, .] for every query, weighed alike; the weights sum to 1 so that tables of any size count alike."""
    return KeptTokens(None, rows.new_full((1, len(rows)), -math.log(len(rows))))
