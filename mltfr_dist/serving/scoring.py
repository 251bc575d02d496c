"""Vectors, scores and the best items, a bounded number of histories at a time.

Shapes: B histories, L positions, D hidden size, I items.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mltfr_dist.data.batch import PADDING_IDX, RankingBatch
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.models.tiles import Pairs
from mltfr_dist.models.top_items import top_items, top_of_some

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


def chunks(numbers: Sequence[Sequence[int]], num_scores: int = 1) -> Iterator[list[int]]:
    """Indices of histories that are computed together: of like length, for the longest decides;
    fewer where ``num_scores`` of each are held.
    """
    size = max(1, min(HISTORIES, SCORES // num_scores))
    order = sorted(range(len(numbers)), key=lambda index: len(numbers[index]))
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
    ranked = model.backbone.for_ranking(item_ids)
    model.look_up(ranked)
    return model.last_hidden(ranked)


@torch.no_grad()
def item_vectors(model: Recommender) -> Tensor:
    """[I + 1, D] of every item; row 0 is padding."""
    return model.backbone.item_embedding.weight[: model.num_items + 1].detach()


@torch.no_grad()
def best_items(
    hidden: Tensor, vectors: Tensor, k: int, left_out: Pairs, allowed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The best items by :func:`top_items`, of all or of some of them.

    Args:
        hidden: [B, D].
        vectors: [I, D] of items 1..I.
        k: Items of each history.
        left_out: Pairs that are no candidates.
        allowed: [n] ids of what alone is a candidate, ascending; None: all.

    Returns:
        Scores and item ids [B, k] on the CPU; -inf and 0 where fewer are left.
    """
    left_out = Pairs(*(column.to(hidden.device) for column in left_out))
    if allowed is None:
        values, ids = top_items(hidden, vectors, k, exclude=left_out)
        return values.float().cpu(), ids.cpu()
    allowed = allowed.to(hidden.device)
    values, ids = top_of_some(hidden, vectors[allowed - 1], allowed, k, left_out)
    return values.float().cpu(), ids.cpu()


def drawn_histories(num_items: int, max_len: int) -> Tensor:
    """[32, max_len] random item ids, of all lengths, padding behind."""
    draw = torch.Generator().manual_seed(0)
    item_ids = torch.randint(1, num_items + 1, (COMPARED, max_len), generator=draw)
    lengths = torch.arange(1, COMPARED + 1) * max_len // COMPARED
    return item_ids * (torch.arange(max_len) < lengths.clamp(min=1)[:, None])
