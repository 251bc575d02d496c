"""Other ways to choose what a table contributes than the user-guided filter: controls, and the
published alternatives.

Shapes: G query blocks, V rows and D_m columns of a table, K kept rows, P prototypes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mltfr_dist.config import FilterConfig
from mltfr_dist.models.draws import LARGEST, STEP, mix
from mltfr_dist.models.placed_table import PlacedTable, WholeTable
from mltfr_dist.models.selectors.base import Queries, Selection, Selector, all_kept, those_kept


class RandomTokens(Selector):
    """K rows drawn uniformly and independently (a row may come twice) for each query block, weighed
    alike.

    The draw is a function of the history up to the block's first position, so a user's tokens are
    the same alone, in any batch and in every evaluation, and no future item shows. Its salt belongs
    to the state; it follows from the run's seed.
    """

    salt: Tensor

    def __init__(
        self, config: FilterConfig, num_rows: int, table_dim: int, hidden_dim: int
    ) -> None:
        super().__init__(config, num_rows, table_dim, hidden_dim)
        self.num_kept = config.num_kept(num_rows)
        self.register_buffer("salt", torch.randint(LARGEST, (1,)))

    @staticmethod
    def rows_kept(config: FilterConfig, num_rows: int) -> int:
        """K."""
        return config.num_kept(num_rows)

    @property
    def reads_keys(self) -> bool:
        """Always."""
        return True

    def forward(self, queries: Queries, table: PlacedTable) -> Selection:
        """The batch's rows, and which each query keeps."""
        keys = queries.keys
        assert keys is not None
        counters = torch.arange(1, self.num_kept + 1, device=keys.device) * STEP
        drawn = mix(mix(keys ^ self.salt)[:, None] + counters) & LARGEST  # [G, K]
        drawn = drawn % table.num_rows
        row_ids, kept = those_kept(drawn, table.num_rows, are_at_hand=table.is_at_hand)
        rows = table.take(row_ids)
        return Selection(rows, row_ids, kept, rows.new_full(kept.shape, -math.log(self.num_kept)))


class AllRows(Selector):
    """No choice: every query attends to all rows, weighed alike."""

    def forward(self, queries: Queries, table: PlacedTable) -> Selection:
        """The table's rows [V, D_m] for all."""
        return all_kept(self.fixed_rows(table))

    def fixed_rows(self, table: PlacedTable) -> Tensor:
        """[V, D_m]."""
        assert isinstance(table, WholeTable)
        return table.whole()


class Prototypes(Selector):
    """A two-layer perceptron over the vocabulary axis maps V rows to P learned rows, which every
    query attends to.
    """

    def __init__(
        self, config: FilterConfig, num_rows: int, table_dim: int, hidden_dim: int
    ) -> None:
        super().__init__(config, num_rows, table_dim, hidden_dim)
        self.inner = nn.Linear(num_rows, config.num_prototypes)
        self.outer = nn.Linear(config.num_prototypes, config.num_prototypes)
        for linear in (self.inner, self.outer):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)

    @staticmethod
    def rows_kept(config: FilterConfig, num_rows: int) -> int:
        """P."""
        return config.num_prototypes

    def forward(self, queries: Queries, table: PlacedTable) -> Selection:
        """[V, D_m] -> [P, D_m]."""
        return all_kept(self.fixed_rows(table))

    def fixed_rows(self, table: PlacedTable) -> Tensor:
        """[P, D_m]."""
        assert isinstance(table, WholeTable)
        made: Tensor = self.outer(F.gelu(self.inner(table.whole().T)))
        return made.T
