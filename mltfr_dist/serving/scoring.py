"""Vectors, scores and the best items, a bounded number of histories at a time.

Shapes: B histories, L positions, D hidden size, I items.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mltfr_dist.data.batch import PADDING_IDX, RankingBatch
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.models.search import best

COMPARED = 32
"""Histories on which two forms of a model are compared."""
HISTORIES, SCORES = 64, 1 << 25
"""Histories, and scores (128 MiB in fp32), that are held at a time."""


def padded(numbers: Sequence[Sequence[int]], max_len: int) -> Tensor:
    """The last ``max_len`` items of each history -> [B, L], padding behind."""
    recent = [row[-max_len:] for row in numbers]
    item_ids = torch.full((len(recent), max(map(len, recent))), PADDING_IDX)
    for row, history in zip(item_ids, recent, strict=True):
        row[: len(history)] = torch.tensor(history, dtype=torch.int64)
    return item_ids


def chunks(numbers: Sequence[Sequence[int]], num_items: int) -> Iterator[list[int]]:
    """Places of histories that are computed together: of like length, for the longest decides."""
    size = max(1, min(HISTORIES, SCORES // (num_items + 1)))
    order = sorted(range(len(numbers)), key=lambda place: len(numbers[place]))
    for start in range(0, len(order), size):
        yield order[start : start + size]


@torch.no_grad()
def score_histories(model: Recommender, item_ids: Tensor) -> Tensor:
    """Scores [B, I + 1] of every item after each history [B, L]; -inf in column 0."""
    none = torch.zeros(0, dtype=torch.int64)
    batch = RankingBatch(item_ids, torch.zeros(len(item_ids), dtype=torch.int64), none, none)
    scores: Tensor = model(batch.to(next(model.parameters()).device))
    return scores


@torch.no_grad()
def user_vectors(model: Recommender, item_ids: Tensor) -> Tensor:
    """What is multiplied with item vectors, [B, D], of histories [B, L]."""
    item_ids = item_ids.to(next(model.parameters()).device)
    hidden, packing, _ = model.hidden(model.backbone.for_ranking(item_ids))
    return model.backbone.last(hidden, packing)


@torch.no_grad()
def item_vectors(model: Recommender) -> Tensor:
    """[I + 1, D] of every item; row 0 is padding."""
    return model.backbone.item_embedding.weight[: model.num_items + 1].detach()


def best_items(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of scores [B, I + 1] and their columns, best first; of equal ones the lower
    column.
    """
    values, columns = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    tied = (values[:, k - 1] == values[:, -1]) & values[:, -1].isfinite() & (values.shape[1] > k)
    values, columns = best(values, columns, k)
    if tied.any():  # on the edge: which of the equal ones came in is not said
        order = scores[tied].sort(dim=1, descending=True, stable=True)
        values[tied], columns[tied] = order.values[:, :k], order.indices[:, :k]
    return values, columns


def drawn_histories(num_items: int, max_len: int) -> Tensor:
    """[32, max_len] random item ids, of all lengths, padding behind."""
    draw = torch.Generator().manual_seed(0)
    item_ids = torch.randint(1, num_items + 1, (COMPARED, max_len), generator=draw)
    lengths = torch.arange(1, COMPARED + 1) * max_len // COMPARED
    return item_ids * (torch.arange(max_len) < lengths.clamp(min=1)[:, None])
