"""Full-ranking metrics: pure functions that return sums, so that ranks reduce by adding.

Shapes: B users, I items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Ties = Literal["pessimistic", "mean", "optimistic"]


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
    if torch.isnan(scores).any() or not torch.isfinite(target_scores).all():
        raise ValueError(
            "scores hold NaN, or a target without a finite score: the model has diverged"
        )
    better = (scores > target_scores).sum(1).double()
    equal = (scores == target_scores).sum(1).double() - 1  # without the target itself
    return (
        better
        + 1
        + {"pessimistic": equal, "mean": equal / 2, "optimistic": torch.zeros_like(equal)}[ties]
    )


def metric_sums(ranks: Tensor, cutoffs: Sequence[int]) -> dict[str, float]:
    """Sums over users of HR@K, NDCG@K and MRR.

    With one target a user, HR@K equals Recall@K, and the ideal DCG is 1, so NDCG@K = 1 / log2(rank + 1) within K.

    Args:
        ranks: [B] ranks from :func:`target_ranks`.
        cutoffs: The K.

    Returns:
        Metric name to sum; divide by the number of users for the metric.
    """
    sums: dict[str, float] = {}
    for k in cutoffs:
        hit = (ranks <= k).double()
        sums[f"HR@{k}"] = float(hit.sum())
        sums[f"NDCG@{k}"] = float((hit / torch.log2(ranks + 1)).sum())
    sums["MRR"] = float((1 / ranks).sum())
    return sums
