"""D4 and D14: memories of a whole batch, experts that read their own table's rows, and a consensus
over equal widths.

Shapes: G query blocks, K kept tokens, S rows of a memory, E its width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mltfr_dist.config import ExpertConfig
from mltfr_dist.models.experts import ExpertCore, Experts, Memory, Router
from mltfr_dist.numerics import at_least_fp32


def own_row_experts(config: ExpertConfig, hidden_dim: int, table_dims: Sequence[int]) -> Experts:
    """Experts that read rows as they are and start apart, so that only those of equal width can be
    merged.
    """
    cores = nn.ModuleList(ExpertCore(config, hidden_dim, width) for width in table_dims)
    return Experts(nn.ModuleList(nn.Identity() for _ in table_dims), cores)


def pooled(memory: Memory) -> Memory:
    """One memory for the whole batch: what any query keeps, as often as it is kept.

    A row that many queries keep is held once: in a softmax, weights of equal rows add up.
    """
    if memory.kept is None:
        return memory
    present, inverse = torch.unique(memory.kept, return_inverse=True)
    weights = at_least_fp32(memory.log_weights).exp()
    total = weights.new_zeros(len(present)).index_add(0, inverse.flatten(), weights.flatten())
    log_weights = total.clamp(min=torch.finfo(total.dtype).tiny).log().to(memory.log_weights.dtype)
    return Memory(F.embedding(present, memory.rows), None, log_weights[None])


def mean_memory(memories: list[Memory]) -> list[Memory]:
    """The k-th kept row averaged over tables, for each k: what the published consensus expert
    attends to.

    Args:
        memories: Of tables of equal width that keep equally many rows.
    """
    stacked = torch.stack([m.log_weights for m in memories])
    log_weights = stacked.logsumexp(0) - math.log(len(memories))
    if memories[0].kept is None:
        return [Memory(torch.stack([m.rows for m in memories]).mean(0), None, log_weights)]
    gathered = [F.embedding(m.kept, m.rows) for m in memories if m.kept is not None]
    rows = torch.stack(gathered).mean(0)  # [G, K, E]
    kept = torch.arange(rows.shape[0] * rows.shape[1], device=rows.device).view(rows.shape[:2])
    return [Memory(rows.flatten(0, 1), kept, log_weights)]


class DoubleSoftmax(Router):
    """D10: a second softmax over the weights of a dense gate."""

    def weights(self, x: Tensor) -> Tensor:
        """[G, n, D] -> [G, n, E]."""
        return torch.softmax(super().weights(x), dim=-1)
