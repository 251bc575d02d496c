"""Full-ranking metrics, one line each, and their sums over users: ranks reduce by adding.

Shapes: B users, I items. A user has one target: HR@K equals Recall@K, MAP@K is MRR within K, and the ideal DCG is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Ties = Literal["pessimistic", "mean", "optimistic"]


class Metric(NamedTuple):
    """What a user's metric is, of the rank of the target."""

    value: Callable[[Tensor, int], Tensor]
    """Ranks [B] from 1 (float64) and K -> the metric of each user [B]."""
    what: str
    at_cutoffs: bool = True
    """Whether it is NAME@K for each K of `evaluation.cutoffs`; else it is NAME, and K is 0."""


METRICS: dict[str, Metric] = {
    "HR": Metric(lambda ranks, k: (ranks <= k).double(), "whether the target is in the first K"),
    "NDCG": Metric(
        lambda ranks, k: (ranks <= k).double() / (ranks + 1).log2(), "1 / log2(rank + 1) within K"
    ),
    "MAP": Metric(
        lambda ranks, k: (ranks <= k).double() / ranks,
        "1 / rank within K: the average precision of one target",
    ),
    "Precision": Metric(
        lambda ranks, k: (ranks <= k).double() / k, "share of the first K that is the target"
    ),
    "MRR": Metric(lambda ranks, k: 1 / ranks, "1 / rank", at_cutoffs=False),
}


def metric_names(cutoffs: Sequence[int]) -> list[str]:
    """What is measured at ``cutoffs``: HR@5, NDCG@5, ..., MRR."""
    at = [f"{name}@{k}" for k in cutoffs for name, metric in METRICS.items() if metric.at_cutoffs]
    return at + [name for name, metric in METRICS.items() if not metric.at_cutoffs]


def is_metric(full_name: str) -> bool:
    """Whether ``full_name`` is a metric's, at any K."""
    return full_name.partition("@")[0] in METRICS


def metric_sums(ranks: Tensor, cutoffs: Sequence[int]) -> dict[str, float]:
    """Sums over users of each of :func:`metric_names`; over the number of users, the metric.

    Args:
        ranks: [B] ranks from :func:`target_ranks`.
        cutoffs: The K.
    """
    sums = {}
    for full_name in metric_names(cutoffs):
        name, _, k = full_name.partition("@")
        sums[full_name] = float(METRICS[name].value(ranks, int(k or 0)).sum())
    return sums


def target_ranks(scores: Tensor, target_ids: Tensor, ties: Ties) -> Tensor:
    """Rank of each user's target among all candidates, 1 for the best.

    Args:
        scores: [B, I + 1]; column = item id; excluded candidates (padding, seen items) hold -inf.
        target_ids: [B] ids of the targets, which must have a finite score.
        ties: Where a target stands among candidates of equal score: last, in the middle, first.

    Returns:
        [B] float64 ranks (with ``ties="mean"`` possibly half-integral).

    Raises:
        ValueError: A score is NaN, or a target's score is not finite: no rank can be stated.
    """
    target_scores = scores.gather(1, target_ids[:, None])  # [B, 1]
    if scores.isnan().any() or not target_scores.isfinite().all():
        raise ValueError(
            "scores hold NaN, or a target without a finite score: the model has diverged"
        )
    better = (scores > target_scores).sum(1).double()
    equal = (scores == target_scores).sum(1).double() - 1  # without the target itself
    return better + 1 + equal * {"pessimistic": 1.0, "mean": 0.5, "optimistic": 0.0}[ties]
