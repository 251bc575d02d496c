"""Who places users' targets among all items: a trained model, or whatever has scores.

Shapes: B users, D hidden size, I items, S pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mltfr_dist.data.batch import PADDING_IDX, RankingBatch
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.models.divided_rows import Division, division_of
from mltfr_dist.models.places import LogNormaliser, Places, count_better
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.models.tiles import Pairs, exact_scores

Placer = Callable[[RankingBatch, Pairs], Places]
"""A ranking batch, and the pairs of its rows and items that do not count (each row's target is
among them, a pair may come twice) -> how many of the other items score higher than each row's
target, and how many the same; of rows without a target nothing is asked."""


Scorer = Callable[[RankingBatch], Tensor]
"""A ranking batch -> scores [B, num_items + 1], column = item id."""
HELD_SCORES = 1 << 24
"""Scores of a :data:`Scorer` that are held at a time (64 MiB, and a few copies), or those of one
user.
"""


def excluded(batch: RankingBatch, *, filter_seen: bool) -> Pairs:
    """What is no competitor of a target: itself and, where asked for, the user's own history."""
    rows = (batch.target_ids != PADDING_IDX).nonzero()[:, 0]
    targets = batch.target_ids[rows]
    if not filter_seen:
        return Pairs(rows, targets)
    return Pairs(torch.cat([rows, batch.seen_rows]), torch.cat([targets, batch.seen_items]))


class MeanLoss:
    """The cross-entropy of each target over all items, seen ones too, while a model ranks."""

    def __init__(self, ranks: Ranks) -> None:
        """Args: ranks: All processes."""
        self._ranks = ranks
        self._sum = torch.zeros(2, dtype=torch.float64, device=ranks.device)

    def add(self, losses: Tensor) -> None:
        """Take in the losses of some users [B]."""
        self._sum += torch.stack([losses.sum(), losses.new_tensor(len(losses))])

    def mean(self) -> float:
        """Mean over the users of all ranks, in nats; every rank must call."""
        total, users = self._ranks.sum(self._sum).tolist()
        return float(total / max(1.0, users))


class ByModel:
    """A model as a placer: :func:`count_better` with its states and item vectors."""

    def __init__(self, model: Callable[..., Any], loss: MeanLoss | None = None) -> None:
        """Args: model: a Recommender, or what calls one; loss: takes in the losses."""
        self._model, self._loss = model, loss

    def __call__(self, batch: RankingBatch, exclude: Pairs) -> Places:
        """Place each row's target; under ZeRO-3 all ranks must call."""
        found: Places = self._model(batch, read=partial(self._count, batch.target_ids, exclude))
        return found

    def _count(
        self, target_ids: Tensor, exclude: Pairs, hidden: Tensor, item_vectors: Tensor
    ) -> Places:
        """States [B, D] and item vectors [I or O, D] -> places [B]; 0 for rows without a target."""
        present = target_ids != PADDING_IDX
        number = present.cumsum(0) - 1  # of a row among those that are ranked
        hidden, targets = hidden[present], target_ids[present]
        exclude = Pairs(number[exclude.rows], exclude.item_ids)
        division = division_of(self._model) if isinstance(self._model, nn.Module) else None
        count = self._in_whole if division is None else partial(self._in_parts, division)
        counts, target_scores, normaliser = count(hidden, item_vectors, targets, exclude)
        if self._loss is not None and normaliser is not None:
            self._loss.add(normaliser - target_scores)
        of_all = [torch.zeros_like(target_ids).masked_scatter(present, c) for c in counts]
        return Places(*of_all)

    def _in_whole(
        self, hidden: Tensor, item_vectors: Tensor, targets: Tensor, exclude: Pairs
    ) -> tuple[Places, Tensor, Tensor | None]:
        """Places, targets' scores and, where the loss is asked for, what normalises it."""
        target_scores = exact_scores(hidden, item_vectors[targets - 1].to(hidden.dtype))
        normaliser = None if self._loss is None else LogNormaliser(hidden)
        counts = count_better(
            hidden, item_vectors, target_scores, exclude=exclude, normaliser=normaliser
        )
        return counts, target_scores, None if normaliser is None else normaliser.value

    def _in_parts(
        self, division: Division, hidden: Tensor, own: Tensor, targets: Tensor, exclude: Pairs
    ) -> tuple[Places, Tensor, Tensor | None]:
        """The same over items that are divided; the model has looked the targets up."""
        model = self._model
        assert isinstance(model, Recommender)
        target_scores = exact_scores(
            hidden, model.backbone.item_embedding(targets).to(hidden.dtype)
        )
        num_items, normalise = model.num_items, self._loss is not None
        counts, normaliser = division.count_better(
            hidden, own, target_scores, exclude, num_items, normalise=normalise
        )
        return counts, target_scores, normaliser


class ByScores:
    """A scorer as a placer: the scores of some users at a time, however many a batch has."""

    def __init__(self, score: Scorer, num_items: int) -> None:
        """Args: score: a baseline; num_items: I."""
        self._score, self._at_once = score, max(1, HELD_SCORES // (num_items + 1))

    def __call__(self, batch: RankingBatch, exclude: Pairs) -> Places:
        """Place each row's target.

        Raises:
            ValueError: A score is NaN, or a target's is not finite: no rank can be stated.
        """
        parts = []
        for start in range(0, len(batch.target_ids), self._at_once):
            part = rows_of(batch, start, start + self._at_once)
            here = (exclude.rows >= start) & (exclude.rows < start + self._at_once)
            scores, targets = self._score(part), part.target_ids[:, None]
            of_targets = scores.gather(1, targets)
            present = part.target_ids != PADDING_IDX
            if scores.isnan().any() or not of_targets[present].isfinite().all():
                raise ValueError("scores hold NaN, or a target without a finite score")
            left_out = (exclude.rows[here] - start, exclude.item_ids[here])
            scores = scores.index_put(left_out, scores.new_tensor(-torch.inf))
            parts.append(((scores > of_targets).sum(1), (scores == of_targets).sum(1)))
        return Places(*(torch.cat(part) for part in zip(*parts, strict=True)))


def rows_of(batch: RankingBatch, start: int, stop: int) -> RankingBatch:
    """The users from ``start`` up to ``stop``."""
    here, rows = (batch.seen_rows >= start) & (batch.seen_rows < stop), slice(start, stop)
    numbers = None if batch.numbers is None else batch.numbers[rows]
    seen_rows, seen_items = batch.seen_rows[here] - start, batch.seen_items[here]
    return RankingBatch(
        batch.item_ids[rows], batch.target_ids[rows], seen_rows, seen_items, numbers
    )
