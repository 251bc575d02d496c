"""What an expert reads of its table: the interface of everything that chooses rows.

Shapes: G query blocks, V rows and D_m columns of a table, D hidden size, S candidate rows, K kept
rows, E width of an expert's rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from mltfr_dist.config import FilterConfig
from mltfr_dist.models.experts import ExpertRows
from mltfr_dist.models.kernels import unit_vectors, used_rows
from mltfr_dist.models.placed_table import PlacedTable
from mltfr_dist.numerics import distinct_in_room


class Reduce(Protocol):
    """How ranks combine what each of them has found; one process has nothing to combine."""

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over ranks."""

    def max(self, values: Tensor) -> Tensor:
        """Element-wise maximum over ranks."""


@dataclass
class Queries:
    """On whose behalf tables are read."""

    vectors: Tensor
    """[G, D] user vectors."""
    keys: Tensor | None = None
    """[G] hashes of the histories up to where the queries are taken; None where no selector reads
    them.
    """

    @cached_property
    def unit(self) -> Tensor:
        """[G, D] unit vectors, made once for all tables."""
        return unit_vectors(self.vectors)


@dataclass(frozen=True)
class Selection:
    """What one table contributes to a batch."""

    candidates: Tensor
    """[S, D_m] rows, of which each query keeps some."""
    row_ids: Tensor
    """[S] their numbers in the table (of prototypes: their own), ascending."""
    kept: Tensor | None
    """[G, K] int64, indices of the candidates that each query keeps, best first; None: every query
    keeps all.
    """
    log_weights: Tensor
    """[G, K], log-softmax of the kept scores, added to the expert's attention logits; [1, S] where
    all are kept.
    """

    def attended(self, adapter: nn.Module) -> ExpertRows:
        """What an expert attends to, its ``adapter`` mapping rows [S, D_m] to its space [S, E]."""
        return ExpertRows(adapter(self.candidates), self.kept, self.log_weights)

    def weights(self) -> Tensor:
        """[G, K] or [1, S], how much each kept row counts."""
        return self.log_weights.exp()


class Selector(nn.Module):
    """Chooses rows of one table on behalf of queries. A strategy is one class and one line of the
    registry.
    """

    scales_rows: ClassVar[bool] = False
    """Whether kept rows are multiplied by weights before an expert maps them."""

    def __init__(
        self, config: FilterConfig, num_rows: int, table_dim: int, hidden_dim: int
    ) -> None:
        """Args: config: the filter's; num_rows, table_dim: V and D_m of the table; hidden_dim:
        D.
        """
        super().__init__()

    @staticmethod
    def rows_kept(config: FilterConfig, num_rows: int) -> int:
        """Rows of a table of ``num_rows`` that one query attends to."""
        return num_rows

    @property
    def uses_shortlist(self) -> bool:
        """Whether the table is searched in part only."""
        return False

    @property
    def reads_keys(self) -> bool:
        """Whether choices depend on the histories' hashes, as random draws do."""
        return False

    def log_tau(self) -> Tensor | None:
        """[1] logarithm of what scores are divided by (a parameter, gathered at its call); None
        where there are no scores.
        """
        return None

    def forward(self, queries: Queries, table: PlacedTable) -> Selection:
        """What the table contributes."""
        raise NotImplementedError

    def fixed_rows(self, table: PlacedTable) -> Tensor | None:
        """The candidates [S, D_m] of every selection in evaluation; None where they depend on the
        queries.
        """
        return None

    def refresh(self, queries: list[Tensor], table: PlacedTable, reduce: Reduce) -> Tensor | None:
        """Choose anew what is searched, where that changes in training; every process must call.

        Args:
            queries: [G, D] of each micro-batch of this process's share of the global batch.
            table: The table.
            reduce: Combines what ranks have found.

        Returns:
            [1] mean over queries of the share of the exact top K that the list so far would have
            found; None where the whole table is searched.
        """
        return None

    def forget(self) -> None:
        """Fetch rows anew when they are next needed, for the table's format has changed."""

    def after_update(self) -> None:
        """Note that an update of the run is over."""


def all_kept(rows: Tensor) -> Selection:
    """All rows [S, .] for every query, weighed alike; weights sum to 1, so that tables of any size
    count alike.
    """
    log_weights = rows.new_full((1, len(rows)), -math.log(len(rows)))
    return Selection(rows, torch.arange(len(rows), device=rows.device), None, log_weights)


def those_kept(kept: Tensor, count: int, *, are_at_hand: bool = False) -> tuple[Tensor, Tensor]:
    """Which of ``count`` rows any query keeps.

    Args:
        kept: [G, K] int64, what each query keeps.
        count: Rows that there are.
        are_at_hand: Whether taking more rows than are kept costs less than asking a GPU how many
            are.

    Returns:
        [U] these rows, ascending, on a GPU maybe the last of them several times; and ``kept`` as
        indices into them.
    """
    if kept.device.type != "cpu":
        if are_at_hand:
            return distinct_in_room(kept, count)
        used, inverse = torch.unique(kept, return_inverse=True)
        return used, inverse
    by_kernel = used_rows(kept, count)
    if by_kernel is not None:
        return by_kernel
    flat = kept.flatten()
    held = torch.zeros(count, dtype=torch.bool).index_fill_(0, flat, True)
    return held.nonzero()[:, 0], (held.cumsum(0) - 1).index_select(0, flat).view_as(kept)
