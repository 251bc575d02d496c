"""Full-ranking metrics, one line each, and their sums over users.

Shapes: B users, I items. A user has one target: HR@K equals Recall@K, MAP@K is MRR within K, and
the ideal DCG is 1.
"""

from __future__ import annotations

import math
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

    Equal ranks are counted first and sums are rounded once, so the order of users changes no bit.

    Args:
        ranks: [U] ranks from :func:`target_ranks`.
        cutoffs: The K.
    """
    import torch  # configuration and help texts read this file, and need no torch

    distinct, counts = torch.unique(ranks.double(), return_counts=True)
    sums = {}
    for full_name in metric_names(cutoffs):
        name, _, k = full_name.partition("@")
        values = METRICS[name].value(distinct, int(k or 0))
        sums[full_name] = math.fsum((values * counts).tolist())
    return sums


def target_ranks(better: Tensor, equal: Tensor, ties: Ties) -> Tensor:
    """Rank of each user's target among all candidates, 1 for the best.

    Args:
        better: [B] number of candidates of a higher score.
        equal: [B] number of other candidates of the same score.
        ties: Where a target stands among candidates of equal score: last, in the middle, first.

    Returns:
        [B] float64 ranks (with ``ties="mean"`` possibly half-integral).
    """
    share = {"pessimistic": 1.0, "mean": 0.5, "optimistic": 0.0}[ties]
    return 1 + better.double() + share * equal.double()
