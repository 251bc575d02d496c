"""What a forward pass says of its gate and its filters, and the sums of it that are logged.

Shapes: N real positions, G query blocks, E experts (of a gate, with the null expert), M tables, K
kept rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """What one forward pass says of its gate and its filters."""

    gate: Tensor
    """[N, E] gate weights, with gradient."""
    kept_weights: list[Tensor]
    """Per table: [G, K] or [1, S] weights of the kept rows, without gradient."""
    num_queries: int
    """G."""
    are_real: Tensor | None = None
    """[G] which of the blocks hold a position, where there is room for more: weights of others, and
    gates of positions beyond the real ones, are zero."""


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
    gate, num_queries = routing.gate.detach().float(), routing.num_queries
    real = routing.are_real
    counted = (
        gate.new_full((1,), float(num_queries)) if real is None else real.sum().float().view(1)
    )
    gates = torch.arange(gate.shape[-1], device=gate.device)
    of_kept = []
    for weights in routing.kept_weights:
        entropies = torch.special.entr(weights.float()).sum()  # log K a query, where K weigh alike
        shared = len(weights) != num_queries  # all queries keep the same rows
        of_kept.append(entropies * num_queries if shared else entropies)
    return RoutingSums(
        gate.sum(0),
        ((gate.argmax(-1, keepdim=True) == gates) & (gate > 0)).sum(0).to(gate.dtype),
        torch.special.entr(gate).sum().view(1),
        torch.stack(of_kept),
        counted,
    )
