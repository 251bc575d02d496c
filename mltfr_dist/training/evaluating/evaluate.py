"""Exact full-ranking evaluation over all ranks.

Every item is a candidate, except (``filter_seen``) those of the user's own full history; the target always is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from mltfr_dist.config import EvaluationConfig
from mltfr_dist.data.batch import PADDING_IDX, RankingBatch
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.distributed.watchdog import heartbeat
from mltfr_dist.metrics import metric_names, metric_sums, target_ranks

ALL = "all"
Members = Callable[[RankingBatch], Tensor]
"""A ranking batch -> [B, S] bool, which users belong to which of S slices."""
Scorer = Callable[[RankingBatch], Tensor]
"""A ranking batch -> scores [B, num_items + 1], column = item id."""
Keep = Callable[[Tensor], object]
"""Takes the ranks [B] of a batch's targets, in the order of the split."""


def evaluate(
    score: Scorer,
    stream: Iterable[RankingBatch],
    config: EvaluationConfig,
    ranks: Ranks,
    keep: Keep | None = None,
) -> dict[str, float]:
    """Rank every user's target among all candidates.

    Args:
        score: The model, or a baseline.
        stream: This rank's users; the ranks' streams together hold every user once.
        config: Cutoffs and the rules for ties and seen items.
        ranks: All processes; every one must call.
        keep: Takes this rank's users' ranks, batch by batch.

    Returns:
        Metric name to mean over users, the same on every rank.
    """
    return evaluate_slices(score, stream, config, ranks, (), None, keep)[ALL]


@torch.no_grad()
def evaluate_slices(
    score: Scorer,
    stream: Iterable[RankingBatch],
    config: EvaluationConfig,
    ranks: Ranks,
    slice_names: Sequence[str],
    members: Members | None,
    keep: Keep | None = None,
) -> dict[str, dict[str, float]]:
    """:func:`evaluate`, for all users and for slices of them, in one pass.

    Returns:
        "all" and each slice's name to its metrics; a slice's also hold ``users``, their number.
    """
    names = metric_names(config.cutoffs)
    totals = torch.zeros(1 + len(slice_names), len(names) + 1, dtype=torch.float64)
    for batch in stream:
        heartbeat()
        batch = batch.to(ranks.device)
        scores = mask_seen(score(batch), batch) if config.filter_seen else score(batch)
        present = batch.target_ids != PADDING_IDX
        target_rank = target_ranks(scores[present], batch.target_ids[present], config.ties)
        if keep is not None:
            keep(target_rank)
        groups = [torch.ones_like(target_rank, dtype=torch.bool)]
        groups += [] if members is None else list(members(batch)[present].unbind(1))
        for row, group in zip(totals, groups, strict=True):
            sums = metric_sums(target_rank[group], config.cutoffs)
            row += torch.tensor([*sums.values(), float(group.sum())], dtype=torch.float64)
    totals = ranks.sum(totals).cpu()
    found = {}
    for slice_name, row in zip((ALL, *slice_names), totals, strict=True):
        found[slice_name] = {
            name: float(total / row[-1].clamp(min=1))
            for name, total in zip(names, row[:-1], strict=True)
        }
        if slice_name != ALL:
            found[slice_name]["users"] = float(row[-1])
    return found


class MeanLoss:
    """A model as a scorer that also sums its loss: the cross-entropy of each target over all items."""

    def __init__(self, score: Scorer, ranks: Ranks) -> None:
        self._score, self._ranks = score, ranks
        self._sum = torch.zeros(2, dtype=torch.float64, device=ranks.device)

    def __call__(self, batch: RankingBatch) -> Tensor:
        """The model's scores, unchanged."""
        scores = self._score(batch)
        present = batch.target_ids != PADDING_IDX
        losses = scores.logsumexp(1) - scores.gather(1, batch.target_ids[:, None])[:, 0]
        self._sum += torch.stack([losses[present].double().sum(), present.sum().double()])
        return scores

    def mean(self) -> float:
        """Mean over the users of all ranks, in nats; every rank must call."""
        total, users = self._ranks.sum(self._sum).tolist()
        return float(total / max(1.0, users))


def mask_seen(scores: Tensor, batch: RankingBatch) -> Tensor:
    """Scores with seen items at -inf, the target's own score kept."""
    target_scores = scores.gather(1, batch.target_ids[:, None])
    scores = scores.index_put((batch.seen_rows, batch.seen_items), scores.new_tensor(-torch.inf))
    return scores.scatter(1, batch.target_ids[:, None], target_scores)
