"""The rows of a table that are searched, chosen anew from time to time (docs/method.md, *The
shortlist*).

Shapes: S rows of the list, V x D_m the table, G queries.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mltfr_dist.models.placed_table import PlacedTable
from mltfr_dist.models.search import Project
from mltfr_dist.models.selectors.base import Reduce
from mltfr_dist.numerics import kth_largest

RECALL_QUERIES = 64
"""Queries at most that the recall of an outgoing list is measured on."""


class Shortlist(nn.Module):
    """Row numbers, part of the model's state and the same in every process, and the rows
    themselves.
    """

    row_ids: Tensor
    """[S], ascending."""
    rows: Tensor | None
    """[S, D_m], fetched once for each list, so that a step needs no other rank's; None until they
    are needed.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("row_ids", torch.arange(size))
        self.register_buffer("rows", None, persistent=False)
        self._is_old = False
        self.register_load_state_dict_post_hook(lambda shortlist, _: shortlist.forget())  # type: ignore[no-untyped-call]

    def candidates(self, table: PlacedTable) -> Tensor:
        """[S, D_m]; where they are not held, every process must ask at the same point."""
        if table.trained:
            return table.take(self.row_ids)
        if self.rows is None or self._is_old:
            rows, held = table.take(self.row_ids), self.rows
            kept = held is not None and _form(held) == _form(rows)
            self.rows = held.copy_(rows) if held is not None and kept else rows
            self._is_old = False
        return self.rows

    def forget(self) -> None:
        """Fetch the rows anew when they are next needed, to where they are: what a GPU has recorded
        reads them there.
        """
        self._is_old = True

    def in_doubt(self, relevance: Tensor, tolerance: float) -> Tensor:
        """Numbers of the rows, ascending, that ``relevance`` [V] does not settle where differences
        err by ``tolerance``.

        None of them but those can change places with another across the end of the list.
        """
        last = kth_largest(relevance, len(self.row_ids))
        return ((relevance - last).abs() <= 2 * tolerance).nonzero()[:, 0]

    @torch.no_grad()
    def choose(self, relevance: Tensor) -> None:
        """Search from now on the rows of highest ``relevance`` [V] (ties: lower row number)."""
        size = len(self.row_ids)
        near = (~(relevance < kth_largest(relevance, size))).nonzero()[:, 0]  # few beyond
        best = relevance[near].sort(descending=True, stable=True).indices[:size]
        self.row_ids.copy_(near[best].sort().values)
        self.forget()

    @torch.no_grad()
    def recall(
        self, queries: Tensor, table: PlacedTable, project: Project, num_kept: int, reduce: Reduce
    ) -> Tensor:
        """[1], float64: mean over queries [G, D] of all processes of the share of the exact top K
        that the list holds.
        """
        exact = table.search(queries, project, num_kept)
        recalled = torch.isin(exact, self.row_ids).float().mean(1).sum().double().view(1)
        total = reduce.sum(torch.cat([recalled, recalled.new_tensor([float(len(queries))])]))
        return total[:1] / total[1:]


def _form(rows: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return rows.shape, rows.dtype, rows.device
