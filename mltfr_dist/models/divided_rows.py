"""An item table of which this process holds some rows: what models ask of it, wherever the others
are.

Before a forward pass the rows of all its items are fetched, each once, as one leaf of the graph;
lookups read from it. After the backward pass it holds their gradients, and who steps the table
sends them to the rows' owners (`distributed/divided_optimizer.py`). So no exchange of ours stands
inside a forward or backward pass.

Shapes: R rows of the whole table (padding, items, special items), O rows of this process, U rows
that were fetched, D hidden size, N positions, B users.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mltfr_dist.models.initial import ItemEmbedding
from mltfr_dist.models.item_rows import ItemRows
from mltfr_dist.models.rank_counts import RankCounts
from mltfr_dist.models.tiles import Pairs


class Division:
    """How rows are divided over processes. Every one must call a method at the same point."""

    own_ids: Tensor
    """[O] item ids of this process's rows, in the order in which it holds them."""

    def positions(self, item_ids: Tensor) -> Tensor:
        """Ids [...] -> their positions [...] in the order in which rows are divided; an exchange of
        nothing.
        """
        raise NotImplementedError

    def fetch(self, own: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows at ascending ``positions`` [U], of this process's [O, D] and the others'.

        Returns:
            [U, D] in ``dtype``.
        """
        raise NotImplementedError

    def cross_entropy(
        self, hidden: Tensor, own: Tensor, targets: Tensor, weights: Tensor, num_items: int
    ) -> Tensor:
        """Softmax cross-entropy over items 1..num_items.

        Args:
            hidden: [N, D] this process's hidden states.
            own: [O, D] output vectors of this process's rows.
            targets: [N] item ids.
            weights: [N] weight of each position.
            num_items: I.

        Returns:
            Scalar, the weighted sum over this process's positions, in fp32 at least.
        """
        raise NotImplementedError

    def count_better(
        self,
        hidden: Tensor,
        own: Tensor,
        target_scores: Tensor,
        exclude: Pairs,
        num_items: int,
        *,
        normalise: bool,
    ) -> tuple[RankCounts, Tensor | None]:
        """What :func:`mltfr_dist.models.rank_counts.count_better` counts, in all processes' rows.

        Args:
            hidden: [B, D] states of this process's users.
            own: [O, D] output vectors of this process's rows.
            target_scores: [B].
            exclude: Pairs that do not count.
            num_items: I.
            normalise: Whether the logarithm of the sum of each user's exponentials is asked for.

        Returns:
            [B] counts, and that logarithm [B] in float64 or None.
        """
        raise NotImplementedError

    def top_items(
        self, hidden: Tensor, own: Tensor, k: int, exclude: Pairs, num_items: int
    ) -> tuple[Tensor, Tensor]:
        """What :func:`mltfr_dist.models.top_items.top_items` finds, in the rows of all processes.

        Args:
            hidden: [B, D] states of this process's users.
            own: [O, D] output vectors of this process's rows.
            k: Items of each user.
            exclude: Pairs that must not be found.
            num_items: I.

        Returns:
            Scores and item ids [B, k]; -inf and 0 where fewer than k items are left.
        """
        raise NotImplementedError


class DividedRows(ItemRows):
    """Takes the place of an ``nn.Embedding``. ``weight`` is this process's rows alone, and no part
    of the state.
    """

    _fetched: Tensor | None
    """[U] ascending positions of the rows at hand."""
    _rows: Tensor
    """[U, D] these rows."""

    def __init__(self, embedding: ItemEmbedding, division: Division) -> None:
        """Args: embedding: [R, D], of which this process's rows are drawn; division: of R rows."""
        super().__init__(embedding)
        self.division = division
        own = embedding.draws.rows(division.own_ids, self.embedding_dim)
        self.register_buffer("weight", own.to(embedding.weight), persistent=False)
        self._own: list[Tensor] = []
        self._fetched, self._rows = None, self.weight[:0]

    def look_up(self, item_ids: Tensor) -> None:
        """Fetch the rows of all ids that the next forward pass reads, [n]. Every process must
        call.
        """
        positions = torch.unique(self.division.positions(item_ids))
        rows = self.division.fetch(self.weight, positions, self.dtype)
        if self.training and torch.is_grad_enabled():
            rows.requires_grad_()
            self._lookups.append((positions, rows))
        self._fetched, self._rows = positions, rows

    def forward(self, item_ids: Tensor) -> Tensor:
        """Ids [...] -> vectors [..., D].

        Raises:
            RuntimeError: An id was not looked up before.
        """
        positions = self.division.positions(item_ids)
        if self._fetched is None:
            raise RuntimeError("a divided item table is read before `look_up`")
        indices = torch.searchsorted(self._fetched, positions).clamp(max=len(self._fetched) - 1)
        if not torch.equal(self._fetched[indices], positions):
            raise RuntimeError("an item is read that `look_up` was not given")
        return F.embedding(indices, self._rows)

    def own_vectors(self) -> Tensor:
        """[O, D] this process's rows, to be scored against; in training a leaf."""
        vectors = self.weight.to(self.dtype)
        if self.training and torch.is_grad_enabled():
            vectors = vectors.detach().requires_grad_()
            self._own.append(vectors)
        return vectors

    def take_own_gradients(self) -> list[Tensor]:
        """Gradients [O, D] of what :meth:`own_vectors` gave since the last call."""
        given, self._own = self._own, []
        return [v.grad for v in given if v.grad is not None]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *_: Any) -> None:
        """This process's rows, where the state holds the whole table; otherwise they come from
        elsewhere.
        """
        whole = state_dict.get(f"{prefix}weight")
        if whole is not None:
            self.weight.copy_(whole[self.division.own_ids.to(whole.device)])


def divided_rows(table: nn.Module) -> DividedRows | None:
    """The divided rows in ``table``, an item embedding or what holds one; None where it is
    whole.
    """
    return next((m for m in table.modules() if isinstance(m, DividedRows)), None)


def division_of(table: nn.Module) -> Division | None:
    """How ``table`` is divided; None where it is whole."""
    rows = divided_rows(table)
    return None if rows is None else rows.division


def own_vectors(table: nn.Module) -> Tensor:
    """[O, D] vectors of this process's rows of a table that is divided, or of what holds one and
    adds to it.
    """
    own: Tensor = table.own_vectors()  # type: ignore[operator]
    return own
