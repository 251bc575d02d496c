"""What ranks users' targets among all items: a trained model, or whatever has scores.

Shapes: B histories, T targets, D hidden size, I items.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mltfr_dist.data.batch import PADDING_IDX, RankingBatch
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.models.divided_rows import Division, division_of
from mltfr_dist.models.folded import folded
from mltfr_dist.models.rank_counts import LogNormaliser, RankCounts, count_better
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.models.tiles import Pairs, exact_scores

Ranker = Callable[[RankingBatch, Pairs], RankCounts]
"""A ranking batch, and the pairs of its targets and items that do not count (each target itself is
among them, a pair may come twice) -> how many of the other items score higher than each target,
and how many the same; of rows that only fill the batch nothing is asked."""


Scorer = Callable[[RankingBatch], Tensor]
"""A ranking batch -> scores [B, num_items + 1] of its histories, column = item id."""
HELD_SCORES = 1 << 24
"""Scores of a :data:`Scorer` that are held at a time (64 MiB, and a few copies), or those of one
target.
"""


def excluded(batch: RankingBatch, *, filter_seen: bool) -> Pairs:
    """What is no competitor of a target: itself and, where asked for, the user's own history, but
    for what is another target of the user. Rows are numbers of targets.
    """
    rows = (batch.target_ids != PADDING_IDX).nonzero()[:, 0]
    targets = batch.target_ids[rows]
    if not filter_seen:
        return Pairs(rows, targets)
    seen_rows, seen_items = batch.seen_rows, batch.seen_items
    if batch.target_rows is not None:
        assert batch.seen_targets is not None
        seen_rows, seen_items = (t[~batch.seen_targets] for t in (seen_rows, seen_items))
        # A user's pairs lie together: they are taken once for each target.
        sizes = torch.bincount(seen_rows, minlength=len(batch.item_ids))
        starts, sizes = (batch.of_targets(t) for t in (sizes.cumsum(0) - sizes, sizes))
        seen_rows = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
        begin = starts - (sizes.cumsum(0) - sizes)
        indices = torch.arange(len(seen_rows), device=sizes.device) + begin[seen_rows]
        seen_items = seen_items[indices]
    return Pairs(torch.cat([rows, seen_rows]), torch.cat([targets, seen_items]))


class MeanLoss:
    """The cross-entropy of each target over all items, seen ones too, while a model ranks."""

    def __init__(self, ranks: Ranks) -> None:
        """Args: ranks: All processes."""
        self._ranks = ranks
        self._sum = torch.zeros(2, dtype=torch.float64, device=ranks.device)

    def add(self, losses: Tensor) -> None:
        """Take in the losses of some targets [T]."""
        self._sum += torch.stack([losses.sum(), losses.new_tensor(len(losses))])

    def mean(self) -> float:
        """Mean over the targets of all ranks, in nats; every rank must call."""
        total, targets = self._ranks.sum(self._sum).tolist()
        return float(total / max(1.0, targets))


class ByModel:
    """A model as a placer: :func:`count_better` with its states and item vectors."""

    def __init__(self, model: Callable[..., Any], loss: MeanLoss | None = None) -> None:
        """Args: model: a Recommender in evaluation, as it is now, or what calls one; loss: takes in
        the losses.

        All ranks must call.
        """
        # What no history changes is computed once, and not for each batch.
        self._model = folded(model) if isinstance(model, Recommender) else model
        self._loss = loss

    def __call__(self, batch: RankingBatch, exclude: Pairs) -> RankCounts:
        """Count for each target; under ZeRO-3 all ranks must call."""
        counts: RankCounts = self._model(batch, read=partial(self._count, batch, exclude))
        return counts

    def _count(
        self, batch: RankingBatch, exclude: Pairs, hidden: Tensor, item_vectors: Tensor
    ) -> RankCounts:
        """States [B, D] and item vectors [I or O, D] -> counts [T]; 0 where there is no target."""
        target_ids = batch.target_ids
        present = target_ids != PADDING_IDX
        number = present.cumsum(0) - 1  # of a target among those that are ranked
        hidden, targets = batch.of_targets(hidden)[present], target_ids[present]
        exclude = Pairs(number[exclude.rows], exclude.item_ids)
        division = division_of(self._model) if isinstance(self._model, nn.Module) else None
        count = self._in_whole if division is None else partial(self._in_blocks, division)
        counts, target_scores, normaliser = count(hidden, item_vectors, targets, exclude)
        if self._loss is not None and normaliser is not None:
            self._loss.add(normaliser - target_scores)
        of_all = [torch.zeros_like(target_ids).masked_scatter(present, c) for c in counts]
        return RankCounts(*of_all)

    def _in_whole(
        self, hidden: Tensor, item_vectors: Tensor, targets: Tensor, exclude: Pairs
    ) -> tuple[RankCounts, Tensor, Tensor | None]:
        """Counts, targets' scores and, where the loss is asked for, what normalises it."""
        target_scores = exact_scores(hidden, item_vectors[targets - 1].to(hidden.dtype))
        normaliser = None if self._loss is None else LogNormaliser(hidden)
        counts = count_better(
            hidden, item_vectors, target_scores, exclude=exclude, normaliser=normaliser
        )
        return counts, target_scores, None if normaliser is None else normaliser.value

    def _in_blocks(
        self, division: Division, hidden: Tensor, own: Tensor, targets: Tensor, exclude: Pairs
    ) -> tuple[RankCounts, Tensor, Tensor | None]:
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
    """A scorer as a placer: the scores of some targets at a time, however many a batch has."""

    def __init__(self, score: Scorer, num_items: int) -> None:
        """Args: score: a baseline; num_items: I."""
        self._score, self._at_once = score, max(1, HELD_SCORES // (num_items + 1))

    def __call__(self, batch: RankingBatch, exclude: Pairs) -> RankCounts:
        """Count for each target.

        Raises:
            ValueError: A score is NaN, or a target's is not finite: no rank can be stated.
        """
        counts = []
        for start in range(0, len(batch.target_ids), self._at_once):
            block = targets_of(batch, start, start + self._at_once)
            here = (exclude.rows >= start) & (exclude.rows < start + self._at_once)
            scores, targets = block.of_targets(self._score(block)), block.target_ids[:, None]
            of_targets = scores.gather(1, targets)
            present = block.target_ids != PADDING_IDX
            if scores.isnan().any() or not of_targets[present].isfinite().all():
                raise ValueError("scores hold NaN, or a target without a finite score")
            left_out = (exclude.rows[here] - start, exclude.item_ids[here])
            scores = scores.index_put(left_out, scores.new_tensor(-torch.inf))
            counts.append(((scores > of_targets).sum(1), (scores == of_targets).sum(1)))
        return RankCounts(*(torch.cat(column) for column in zip(*counts, strict=True)))


class SameForAll:
    """Scores of items that are every user's: a scorer, and a ranker that counts among them sorted,
    so that nothing of size users x items is formed.
    """

    def __init__(self, of_items: Tensor) -> None:
        """Args: of_items: [num_items + 1] fp32 scores; that of padding is not looked at."""
        self._scores = of_items
        self._scores[PADDING_IDX] = -torch.inf
        self._sorted = torch.from_numpy(np.sort(of_items[1:].numpy()))  # torch's keeps an order

    def __call__(self, batch: RankingBatch) -> Tensor:
        """Scores [B, num_items + 1]."""
        scores = self._scores.to(batch.item_ids.device)
        return scores.expand(len(batch.item_ids), -1).clone()

    def count(self, batch: RankingBatch, exclude: Pairs) -> RankCounts:
        """What stands before and beside each target."""
        targets = self._scores[batch.target_ids.cpu()]
        above = len(self._sorted) - torch.searchsorted(self._sorted, targets, right=True)
        equal = len(self._sorted) - torch.searchsorted(self._sorted, targets) - above
        rows, items = (ids.cpu().long() for ids in exclude)
        pairs = torch.unique(rows * len(self._scores) + items)  # one may come twice
        rows, items = pairs // len(self._scores), pairs % len(self._scores)
        left_out, of_row = self._scores[items], targets[rows]
        above.index_add_(0, rows, -(left_out > of_row).long())
        equal.index_add_(0, rows, -(left_out == of_row).long())
        return RankCounts(*(counts.to(batch.target_ids.device) for counts in (above, equal)))


def targets_of(batch: RankingBatch, start: int, stop: int) -> RankingBatch:
    """The targets from ``start`` up to ``stop``, with their histories."""
    first, last, own = start, stop, batch.target_rows
    if own is not None:
        own = own[start:stop]
        first, last = int(own[0]), int(own[-1]) + 1
        own = own - first
    here, rows = (batch.seen_rows >= first) & (batch.seen_rows < last), slice(first, last)
    return RankingBatch(
        batch.item_ids[rows],
        batch.target_ids[start:stop],
        batch.seen_rows[here] - first,
        batch.seen_items[here],
        None if batch.numbers is None else batch.numbers[rows],
        own,
        None if batch.seen_targets is None else batch.seen_targets[here],
    )
