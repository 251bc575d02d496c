"""What one forward pass of MLTFR says about its gate and its filters.

Shapes: N real positions of the batch, G query blocks, E experts (of a gate, with the null expert),
M tables.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Of one batch."""

    gate: Tensor
    """[N, E] gate weights, with gradient."""
    kept_weights: list[Tensor]
    """Per table: [G, K] or [1, S] weights of the kept rows, without gradient."""
    num_queries: int
    """G."""


class RoutingSums(NamedTuple):
    """Sums over the real positions and query blocks of a batch; those of its pieces add."""

    gate: Tensor
    """[E] gate weights."""
    top: Tensor
    """[E] positions at which the gate is the largest."""
    entropy: Tensor
    """[1] entropy of the gate, nats."""
    kept_entropy: Tensor
    """[M] entropy of the kept tokens' weights of each table, nats, over the query blocks."""
    num_queries: Tensor
    """[1] query blocks."""


@torch.no_grad()
def routing_sums(routing: Routing) -> RoutingSums:
    """Sums of a batch."""
    gate = routing.gate.detach().float()
    top = (
        gate.argmax(-1, keepdim=True) == torch.arange(gate.shape[-1], device=gate.device)
    ).float()
    entropy = -(gate * gate.clamp(min=1e-12).log()).sum().view(1)
    num_queries = routing.num_queries
    of_kept = []
    for weights in routing.kept_weights:
        entropies = torch.special.entr(weights.float()).sum(-1)  # log K where K weigh alike
        shared = len(weights) != num_queries  # all queries keep the same rows: one value for each
        of_kept.append(entropies.sum() * (num_queries if shared else 1))
    return RoutingSums(
        gate.sum(0),
        top.sum(0),
        entropy,
        torch.stack(of_kept),
        gate.new_full((1,), float(num_queries)),
    )
