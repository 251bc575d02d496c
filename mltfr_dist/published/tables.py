"""D7: tables that are called frozen, and drift."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mltfr_dist.models.placed_table import OwnTable


class TrainedTable(OwnTable):
    """A table whose rows are a trained parameter."""

    trained = is_at_hand = True

    def __init__(self, rows: Tensor) -> None:
        """Args: rows: [V, D_m], copied."""
        super().__init__()
        self.num_rows, self.dim = rows.shape
        self.rows = nn.Parameter(rows.clone())

    def whole(self) -> Tensor:
        """[V, D_m]."""
        return self.rows

    def take(self, row_ids: Tensor) -> Tensor:
        """Rows ``row_ids`` [n] -> [n, D_m]."""
        return self.rows.index_select(0, row_ids)

    def cast(self, dtype: torch.dtype) -> None:
        """DeepSpeed casts parameters itself."""
