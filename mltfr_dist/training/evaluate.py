"""Exact full-ranking evaluation over all ranks.

Every item is a candidate, except (``filter_seen``) those of the user's own full history; the target always is one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mltfr_dist.config import EvaluationConfig
from mltfr_dist.data.batch import PADDING_IDX, RankingBatch
from mltfr_dist.data.stream import RankingStream
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.metrics import metric_sums, target_ranks

Scorer = Callable[[RankingBatch], Tensor]
"""A ranking batch -> scores [B, num_items + 1], column = item id."""


@torch.no_grad()
def evaluate(score: Scorer, stream: RankingStream, config: EvaluationConfig, ranks: Ranks) -> dict[str, float]:
    """Rank every user's target among all candidates.

    Args:
        score: The model, or a baseline.
        stream: This rank's users; the ranks' streams together hold every user once.
        config: Cutoffs and the rules for ties and seen items.
        ranks: All processes; every one must call.

    Returns:
        Metric name to mean over users, the same on every rank.
    """
    names = list(metric_sums(torch.ones(0), config.cutoffs))
    totals = torch.zeros(len(names) + 1, dtype=torch.float64)
    for batch in stream:
        batch = batch.to(ranks.device)
        scores = mask_seen(score(batch), batch) if config.filter_seen else score(batch)
        present = batch.target_ids != PADDING_IDX
        sums = metric_sums(target_ranks(scores[present], batch.target_ids[present], config.ties), config.cutoffs)
        totals += torch.tensor([*sums.values(), float(present.sum())], dtype=torch.float64)
    totals = ranks.sum(totals).cpu()
    return {name: float(total / totals[-1].clamp(min=1)) for name, total in zip(names, totals[:-1], strict=True)}


def mask_seen(scores: Tensor, batch: RankingBatch) -> Tensor:
    """Scores with seen items at -inf, the target's own score kept."""
    target_scores = scores.gather(1, batch.target_ids[:, None])
    scores = scores.index_put((batch.seen_rows, batch.seen_items), scores.new_tensor(-torch.inf))
    return scores.scatter(1, batch.target_ids[:, None], target_scores)
