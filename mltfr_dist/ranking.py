"""A trained model in use: scores of all items after a history, and the best of them.

A finished run (training/using/inference.py) and an exported model (exported.py) are both a
:class:`Ranker`. Shapes: B histories, L positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from mltfr_dist.data.batch import PADDING_IDX, RankingBatch
from mltfr_dist.errors import DataError
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.schema import or_nearest

ECHOED_ITEMS = 10
"""Unknown ids that an error names."""

ItemId = str | int
"""A raw item id; a whole number stands for its digits."""


@dataclass(frozen=True)
class ItemMap:
    """Raw ids and titles of items 1..num_items; index 0 is padding."""

    ids: list[str]
    titles: list[str | None]
    listed_in: str
    """File that lists the ids, for messages."""

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Raw id to 1..num_items."""
        return {raw: index for index, raw in enumerate(self.ids) if index}

    def name(self, item: int) -> str:
        """Title where there is one, raw id otherwise."""
        return self.titles[item] or self.ids[item]

    def encode(self, history: Sequence[ItemId]) -> list[int]:
        """Raw item ids to 1..num_items.

        Raises:
            DataError: No history of ids, an empty one, or an id that is not known.
        """
        raw_ids = _as_texts(history)
        if not raw_ids:
            raise DataError("The history is empty.", remedy="Give at least one item id.")
        unknown = [raw for raw in raw_ids if raw not in self.numbers]
        if unknown:
            raise DataError(
                f"Unknown item id{'s' if len(unknown) > 1 else ''} "
                + ", ".join(unknown[:ECHOED_ITEMS])
                + (f" and {len(unknown) - ECHOED_ITEMS} more" * (len(unknown) > ECHOED_ITEMS))
                + f"{or_nearest(unknown[0], self.numbers)}.",
                rule="Ids are those of the raw data that preparation kept "
                f"({self.listed_in} lists them).",
                remedy="Leave them out or correct them.",
            )
        return [self.numbers[raw] for raw in raw_ids]


@dataclass(frozen=True)
class Recommendation:
    """One recommended item."""

    item_id: str
    title: str | None
    score: float


@dataclass(frozen=True)
class Ranker:
    """A trained model in evaluation mode, and the items that it ranks."""

    model: Recommender
    items: ItemMap
    max_len: int
    """Items of a history that the model reads, the most recent ones."""

    @property
    def item_ids(self) -> list[str]:
        """Raw ids of the items; index 0 is padding."""
        return self.items.ids

    def scores(self, histories: Sequence[Sequence[ItemId]]) -> Tensor:
        """Scores of every item after each history, seen ones too.

        Args:
            histories: Raw item ids, oldest first; the last ``max_len`` of each are read.

        Returns:
            [B, num_items + 1] on the CPU, column = index in ``item_ids``; -inf in column 0.

        Raises:
            DataError: No histories, an empty one, or an id that the model does not know.
        """
        encoded = [self.items.encode(history) for history in _as_list(histories)]
        if not encoded:
            raise DataError("There are no histories.", remedy="Give at least one.")
        recent = [numbers[-self.max_len :] for numbers in encoded]
        item_ids = torch.full((len(recent), max(map(len, recent))), PADDING_IDX)  # [B, L]
        for row, numbers in zip(item_ids, recent, strict=True):
            row[: len(numbers)] = torch.tensor(numbers)
        return score_histories(self.model, item_ids).cpu()

    def recommend(
        self, history: Sequence[ItemId], k: int = 10, *, keep_seen: bool = False
    ) -> list[Recommendation]:
        """The ``k`` items of highest score after a history, best first.

        Args:
            history: Raw item ids, oldest first.
            k: Items to return; fewer come back where all others are in the history.
            keep_seen: Whether items of the history may come again.

        Raises:
            DataError: An id that the model does not know, an empty history, or a ``k`` out of
                range.
        """
        seen, num_items = self.items.encode(history), len(self.item_ids) - 1
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= num_items:
            raise DataError(
                f"k is {k!r}; there are {num_items} items.",
                rule="k lies in 1..number of items.",
                remedy="Give another k.",
            )
        scores = self.scores([history])[0]
        if not keep_seen:
            scores[seen] = -torch.inf
        best = scores.topk(min(k, int(torch.isfinite(scores).sum())))
        return [
            Recommendation(self.items.ids[item], self.items.titles[item], score)
            for item, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


@torch.no_grad()
def score_histories(model: Recommender, item_ids: Tensor) -> Tensor:
    """Scores [B, num_items + 1] of every item after each history [B, L]; -inf in column 0."""
    none = torch.zeros(0, dtype=torch.int64)
    batch = RankingBatch(item_ids, torch.zeros(len(item_ids), dtype=torch.int64), none, none)
    scores: Tensor = model(batch.to(next(model.parameters()).device))
    return scores


def _as_list(values: object) -> list[Sequence[ItemId]]:
    """Histories in a list.

    Raises:
        DataError: One text, or nothing that can be gone through.
    """
    if isinstance(values, str | bytes) or not hasattr(values, "__iter__"):
        raise DataError(
            f"{values!r} is no list of ids.",
            rule="A history is a list of item ids, oldest first.",
            remedy="Put the ids into a list, as in ['50', '172'].",
        )
    return list(values)


def _as_texts(history: object) -> list[str]:
    found = []
    for raw in _as_list(history):
        if isinstance(raw, bool) or not isinstance(raw, str | int | np.integer):
            raise DataError(
                f"The history holds {raw!r}, of type {type(raw).__name__}.",
                rule="An item id is a text or a whole number.",
                remedy="Give the ids as they stand in the raw data.",
            )
        found.append(raw if isinstance(raw, str) else str(int(raw)))
    return found
