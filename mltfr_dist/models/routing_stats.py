"""What one forward pass of MLTFR says about its gate and its filters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mltfr_dist.models.token_filter import KeptTokens


class RoutingStats(NamedTuple):
    """Sums over the real positions of a batch; ranks and micro-batches add."""

    gate_sum: Tensor
    """[E] gate weights."""
    top_sum: Tensor
    """[E] positions at which the gate is the largest."""
    entropy_sum: Tensor
    """[1] entropy of the gate, nats."""
    balance_sum: Tensor
    """[1] load-balancing term, with gradient."""
    kept_entropy_sum: Tensor
    """[M] entropy of the kept tokens' weights of each table, nats, over the query blocks."""
    num_queries: Tensor
    """[1] query blocks."""


def routing_stats(
    gate_weights: Tensor, balance: Tensor, kept: Sequence[KeptTokens], num_queries: int
) -> RoutingStats:
    """Sums of a batch.

    Args:
        gate_weights: [N, E] of the real positions.
        balance: Scalar, the load-balancing term.
        kept: Per table, what its filter keeps.
        num_queries: G, blocks that share a query.
    """
    detached = gate_weights.detach().float()
    top = F.one_hot(detached.argmax(-1), detached.shape[-1]).float()
    entropy = -(detached * detached.clamp(min=1e-12).log()).sum().view(1)
    of_kept = [entropies(tokens).mean() * num_queries for tokens in kept]
    return RoutingStats(
        detached.sum(0),
        top.sum(0),
        entropy,
        balance.view(1),
        torch.stack(of_kept) if of_kept else detached.new_zeros(0),
        detached.new_full((1,), float(num_queries)),
    )


@torch.no_grad()
def entropies(kept: KeptTokens) -> Tensor:
    """[G] entropy of each query's kept weights in nats, log K where K weigh alike; [1] where all keep alike."""
    soft = kept.log_weights.float().exp()
    weights = soft if kept.row_weights is None else kept.row_weights.float()
    summed: Tensor = torch.special.entr(weights).sum(-1)
    return summed
