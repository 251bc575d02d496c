"""A trained model in use: scores of items after histories, the best of them, vectors, explanations.

A finished run (training/using/inference.py) and an exported model (exported.py) are both a
:class:`Ranker`. It may be used by several threads at once. Shapes: B histories, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mltfr_dist.data.batch import PADDING_IDX
from mltfr_dist.errors import DataError
from mltfr_dist.models.folded import folded
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.serving.candidates import Candidates, Empty, check_told, checked_k
from mltfr_dist.serving.explaining import TableView, Tokens, explain
from mltfr_dist.serving.histories import Histories, Unknown, encode, held, is_single
from mltfr_dist.serving.items import ItemId, ItemMap
from mltfr_dist.serving.results import Recommendation, Recommendations
from mltfr_dist.serving.scoring import (
    best_items,
    chunks,
    item_vectors,
    padded,
    score_histories,
    user_vectors,
)

__all__ = ["ItemId", "ItemMap", "Ranker", "Recommendation", "Recommendations", "score_histories"]

Floats = npt.NDArray[np.float32]
_folding = Lock()


@dataclass(frozen=True)
class Ranker:
    """A trained model in evaluation mode, and the items that it ranks.

    Histories are a list of lists of raw ids (a text, or a whole number for its digits), oldest
    first; or a NumPy array, a column of lists or a table with a column ``history`` of pandas,
    polars or Arrow; or what :meth:`encode` gave. Of each the last ``max_len`` are read. Ids that
    the model does not know are refused; with ``unknown="drop"`` they are left out and counted.
    """

    model: Recommender
    items: ItemMap
    max_len: int
    """Items of a history that the model reads, the most recent ones."""

    @property
    def item_ids(self) -> Sequence[str]:
        """Raw ids of the items; index 0 is padding."""
        return self.items.ids

    @property
    def tokens(self) -> Sequence[Tokens]:
        """The token tables' names of rows; none for a bare backbone."""
        return ()

    @property
    def serving(self) -> Recommender:
        """The model with all computed that does not depend on histories; scores are equal to the
        bit.
        """
        with _folding:
            return self._serving

    @cached_property
    def _serving(self) -> Recommender:
        return folded(self.model)

    def encode(self, histories: Any, unknown: Unknown = "refuse") -> Histories:
        """Histories as numbers of items, with the count of ids that were dropped; every method
        takes them.

        Raises:
            DataError: No histories, or an id that the model does not know.
            ConfigError: ``unknown`` is neither "refuse" nor "drop".
        """
        return encode(histories, self.items, unknown)

    @overload
    def recommend(
        self,
        histories: Sequence[ItemId],
        k: int = ...,
        *,
        exclude: Any = ...,
        allow: Any = ...,
        filter_seen: bool = ...,
        unknown: Unknown = ...,
        empty: Empty = ...,
    ) -> list[Recommendation]: ...

    @overload
    def recommend(
        self,
        histories: Any,
        k: int = ...,
        *,
        exclude: Any = ...,
        allow: Any = ...,
        filter_seen: bool = ...,
        unknown: Unknown = ...,
        empty: Empty = ...,
    ) -> Recommendations: ...

    def recommend(
        self,
        histories: Any,
        k: int = 10,
        *,
        exclude: Any = None,
        allow: Any = None,
        filter_seen: bool = True,
        unknown: Unknown = "refuse",
        empty: Empty = "refuse",
    ) -> list[Recommendation] | Recommendations:
        """The ``k`` items of highest score after each history, best first; of equal scores the item
        of lower index.

        Args:
            histories: See the class. A single history gives a list of its items, several give
                :class:`Recommendations`, a sequence of such lists.
            k: Items to return; fewer come back where fewer candidates are left.
            exclude: Raw ids that are no candidates: a list for all histories, or a list for each.
            allow: Raw ids that alone are candidates, likewise; None: all.
            filter_seen: Whether the items of a history are no candidates.
            unknown: "refuse", or "drop" ids that the model does not know.
            empty: "refuse", or answer empty histories by "popular" items; scores are then counts.

        Raises:
            DataError: An id that the model does not know, an empty history, or a ``k`` out of
                range.
            ConfigError: An option that is none of its values.
        """
        histories = held(histories)
        single = is_single(histories)
        encoded = encode([histories] if single else histories, self.items, unknown)
        candidates = Candidates.of(self.items, encoded, exclude, allow, filter_seen, empty)
        k = checked_k(k, candidates)
        numbers = np.zeros((len(encoded), k), dtype=np.int64)
        scores = np.full((len(encoded), k), -np.inf, dtype=np.float32)
        for indices in chunks(encoded.numbers):
            for together in candidates.alike(indices):
                values, item_ids = self._best(together, candidates, k)
                numbers[together], scores[together] = item_ids.numpy(), values.numpy()
        many = Recommendations(self.items, numbers, scores, encoded.users, encoded.dropped)
        return many[0] if single else many

    def _best(self, indices: list[int], candidates: Candidates, k: int) -> tuple[Tensor, Tensor]:
        """Scores and item ids [b, k] of the best candidates of histories that are all told or all
        empty; -inf and 0 where fewer are left.
        """
        rows = [candidates.histories.numbers[index] for index in indices]
        if rows[0]:
            hidden = user_vectors(self.serving, padded(rows, self.max_len))
            vectors = item_vectors(self.serving)[1:]
        else:  # a count is a score of one column
            hidden, vectors = torch.ones(len(rows), 1), candidates.popularity()[:, None]
        left_out, allowed = candidates.left_out(indices), candidates.allowed(indices[0])
        return best_items(hidden, vectors, k, left_out, allowed)

    def scores(self, histories: Any, *, unknown: Unknown = "refuse") -> Tensor:
        """Scores of every item after each history, seen ones too.

        Returns:
            [B, num_items + 1] on the CPU, column = index in ``item_ids``; -inf in column 0.

        Raises:
            DataError: No histories, an empty one, or an id that the model does not know.
        """
        encoded = self._told(histories, unknown)
        scores = torch.empty(len(encoded), self.items.num_items + 1)
        for indices in chunks(encoded.numbers, self.items.num_items + 1):
            item_ids = padded([encoded.numbers[index] for index in indices], self.max_len)
            scores[indices] = score_histories(self.serving, item_ids).float().cpu()
        return scores

    def score(
        self, histories: Any, items: Sequence[ItemId], *, unknown: Unknown = "refuse"
    ) -> Floats:
        """Scores [B, n] of ``items`` (n raw ids) after each history, seen ones too.

        Raises:
            DataError: No histories, an empty one, or an id that the model does not know.
        """
        encoded = self._told(histories, unknown)
        columns = self.items.encode(items, "The list of items")
        scores = np.empty((len(encoded), len(columns)), dtype=np.float32)
        for indices in chunks(encoded.numbers, self.items.num_items + 1):
            item_ids = padded([encoded.numbers[index] for index in indices], self.max_len)
            scores[indices] = score_histories(self.serving, item_ids)[:, columns].float().cpu()
        return scores

    def user_vectors(self, histories: Any, *, unknown: Unknown = "refuse") -> Floats:
        """[B, D]: a score is the product of a user's and an item's vector.

        Raises:
            DataError: No histories, an empty one, or an id that the model does not know.
        """
        encoded = self._told(histories, unknown)
        dim = self.model.vectors(torch.tensor([PADDING_IDX])).shape[1]
        vectors = np.empty((len(encoded), dim), dtype=np.float32)
        for indices in chunks(encoded.numbers):
            item_ids = padded([encoded.numbers[index] for index in indices], self.max_len)
            vectors[indices] = user_vectors(self.serving, item_ids).float().cpu()
        return vectors

    def user_vector(self, history: Sequence[ItemId]) -> Floats:
        """[D] of one history; see :meth:`user_vectors`."""
        told = Histories([self.items.encode(history)], None, 0)
        vector: Floats = self.user_vectors(told)[0]
        return vector

    def item_vectors(self) -> Floats:
        """[num_items + 1, D], row = index in ``item_ids``; row 0 is padding: leave it out of a
        vector index.
        """
        vectors: Floats = item_vectors(self.serving).float().cpu().numpy().copy()
        return vectors

    def explain(self, history: Sequence[ItemId]) -> list[TableView]:
        """Kept tokens per table and gate weights at the end of a history; none for a bare backbone.

        Raises:
            DataError: An empty history, or an id that the model does not know.
        """
        numbers = self.items.encode(history)
        if self.model.mltfr is None:
            return []
        device = next(self.model.parameters()).device
        return explain(self.serving, self.tokens, padded([numbers], self.max_len).to(device))[0]

    def _told(self, histories: Any, unknown: Unknown) -> Histories:
        """Histories, none of them empty."""
        histories = held(histories)
        if is_single(histories) and len(histories):
            raise DataError(
                f"{histories!r:.80} is one history.",
                rule="Histories are a list of lists of item ids.",
                remedy="Put it into a list.",
            )
        encoded = encode(histories, self.items, unknown)
        check_told(encoded)
        return encoded
