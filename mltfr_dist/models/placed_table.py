"""Token tables as the model uses them: what it asks of one, and tables that this process can read
as a whole.

Tables whose rows are divided over processes are in `distributed/table_shards.py`. None is part of
the state.

Shapes: V x D_m the table, G queries, D hidden size, K kept rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mltfr_dist.models.draws import GumbelNoise
from mltfr_dist.models.relevance import row_relevance
from mltfr_dist.models.search import Project, nearest_rows


class PlacedTable(nn.Module):
    """A token table, wherever its rows are held. Every process must call a method at the same
    point.
    """

    num_rows: int
    """V."""
    dim: int
    """D_m."""
    trained = False
    """Whether rows change in training."""
    is_at_hand = False
    """Whether rows are in the memory of the model's device, so that taking more of them costs
    little.
    """

    def take(self, row_ids: Tensor) -> Tensor:
        """Rows of ascending numbers ``row_ids`` [n] -> [n, D_m], on the model's device."""
        raise NotImplementedError

    def search(
        self, query: Tensor, project: Project, num_kept: int, noise: GumbelNoise | None = None
    ) -> Tensor:
        """[G, K] numbers of the rows of highest score for each of this process's queries [G, D],
        best first.
        """
        raise NotImplementedError

    def relevance(self, query: Tensor, project: Project, needed: int | None = None) -> Tensor:
        """[V] largest cosine of each row with any of the queries [G, D], of this process's
        at least.

        Only the ``needed`` highest count (None: all); others may be given lower.
        """
        raise NotImplementedError

    def cast(self, dtype: torch.dtype) -> None:
        """Bring the rows to the format of the forward pass; who casts a model casts parameters."""
        raise NotImplementedError


class WholeTable(PlacedTable):
    """A table that this process can read as a whole."""

    def whole(self) -> Tensor:
        """[V, D_m] on the model's device."""
        raise NotImplementedError


class OwnTable(WholeTable):
    """A table whose rows this process holds, searched without asking anybody."""

    rows: Tensor
    """[V, D_m], wherever they are."""

    def search(
        self, query: Tensor, project: Project, num_kept: int, noise: GumbelNoise | None = None
    ) -> Tensor:
        """[G, K] numbers of the rows of highest score for each query [G, D], best first."""
        return nearest_rows(query, self.rows, project, num_kept, noise)

    def relevance(self, query: Tensor, project: Project, needed: int | None = None) -> Tensor:
        """[V] largest cosine of each row with any of the queries [G, D]."""
        return row_relevance(query, self.rows, project, needed=needed)


class ReplicatedTable(OwnTable):
    """In the memory of this process, on the model's device."""

    is_at_hand = True

    def __init__(self, rows: Tensor) -> None:
        """Args: rows: [V, D_m]."""
        super().__init__()
        self.num_rows, self.dim = rows.shape
        self.register_buffer("rows", rows, persistent=False)

    def whole(self) -> Tensor:
        """[V, D_m]."""
        return self.rows

    def take(self, row_ids: Tensor) -> Tensor:
        """Rows ``row_ids`` [n] -> [n, D_m]."""
        return self.rows.index_select(0, row_ids)

    def cast(self, dtype: torch.dtype) -> None:
        """Bring the rows to ``dtype``."""
        self.rows = self.rows.to(dtype)


class MappedTable(OwnTable):
    """Read from its file where it is used: all processes of a node share the pages of one physical
    copy.
    """

    like: Tensor
    """[0], device and format of the model."""

    def __init__(self, rows: Tensor) -> None:
        """Args: rows: [V, D_m] on the host, in the file's format."""
        super().__init__()
        self.num_rows, self.dim = rows.shape
        self.rows = rows  # no buffer, which would follow the model to its device
        self.register_buffer("like", rows.new_empty(0), persistent=False)

    def whole(self) -> Tensor:
        """[V, D_m], a copy unless the model is on the CPU in the file's format."""
        return self.rows.to(self.like)

    def take(self, row_ids: Tensor) -> Tensor:
        """Rows ``row_ids`` [n] -> [n, D_m]."""
        return self.rows.index_select(0, row_ids.cpu()).to(self.like)

    def cast(self, dtype: torch.dtype) -> None:
        """Note the format; rows are brought to it where they are used."""
        self.like = self.like.to(dtype)
