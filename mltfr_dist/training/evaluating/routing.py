"""Does one expert dominate? The gate over a split's real positions, of a trained model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from mltfr_dist.data.batch import RankingBatch
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.models.routing import routing_sums

WEIGHT, TOP_SHARE = "weight/", "top_share/"


@torch.no_grad()
def measure_routing(
    model: Recommender, stream: Iterable[RankingBatch], ranks: Ranks, table_names: Sequence[str]
) -> dict[str, float]:
    """Mean gate weights and entropy over all real positions; all ranks must call.

    Returns:
        ``entropy`` (nats) and ``largest_weight``, ``largest_top_share``; per gate ``weight/NAME``,
        its mean weight, and ``top_share/NAME``, the share of positions at which it is the largest.
        Empty without MLTFR.
    """
    if model.mltfr is None:
        return {}
    names = model.mltfr.gate_names(table_names)
    totals = torch.zeros(2 * len(names) + 1, dtype=torch.float64, device=ranks.device)
    for batch in stream:
        ranked = model.backbone.for_ranking(batch.item_ids.to(ranks.device))
        model.look_up(ranked)
        _, _, routing = model.hidden(ranked)
        assert routing is not None
        sums = routing_sums(routing)
        totals += torch.cat([sums.gate, sums.top, sums.entropy]).double()
    total = ranks.sum(totals).cpu()
    means = (
        total / total[: len(names)].sum()
    ).tolist()  # the gates of a position sum to 1: together they count positions
    weights, top_shares = means[: len(names)], means[len(names) : -1]
    measured = {
        "entropy": means[-1],
        "largest_weight": max(weights),
        "largest_top_share": max(top_shares),
    }
    measured |= {WEIGHT + name: weight for name, weight in zip(names, weights, strict=True)}
    return measured | {
        TOP_SHARE + name: share for name, share in zip(names, top_shares, strict=True)
    }
