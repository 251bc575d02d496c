"""The router, which mixes the experts.

Shapes: E experts, the null expert included where there is one; dots stand for positions, in blocks
[G, n] where experts are left out block by block.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mltfr_dist.config import RouterConfig
from mltfr_dist.models.transformer import init_weights
from mltfr_dist.numerics import at_least_fp32
from mltfr_dist.registry import load
from mltfr_dist.routers import ROUTERS


class Router(nn.Module):
    """Gate over the experts: dense or over the best few, optionally with the choice of no expert at
    all.
    """

    LOAD_DECAY = 0.9
    """Share of the old value in the moving average of the load."""

    load: Tensor
    """[E] moving average of each gate's weight over past steps."""

    def __init__(self, config: RouterConfig, hidden_dim: int, num_experts: int) -> None:
        super().__init__()
        self.config, self.num_experts = config, num_experts
        num_gates = num_experts + config.null_expert
        self.linear = nn.Linear(hidden_dim, num_gates)
        self.apply(init_weights)
        self.register_buffer("load", torch.full((num_gates,), 1 / num_gates))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> gate weights [..., E], summing to 1; E counts the null expert, which stands
        last.
        """
        return self.weights(x).to(x.dtype)

    def weights(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., E], in fp32 at least."""
        logits = at_least_fp32(self.linear(x))
        if self.training and self.config.expert_dropout:
            logits = logits.masked_fill(self._dropped(logits), -torch.inf)
        if self.config.top_k is not None:
            last_kept = logits.topk(self.config.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < last_kept, -torch.inf)
        return self.normalised(logits)

    def normalised(self, logits: Tensor) -> Tensor:
        """[..., E], -inf for what is left out -> weights that sum to 1, zero for what is left
        out.
        """
        return torch.softmax(logits, dim=-1)

    def _dropped(self, logits: Tensor) -> Tensor:
        """[G, 1, E] experts left out of each query block; never the null expert, and never all."""
        dropped = torch.rand_like(logits[:, :1]) < self.config.expert_dropout
        dropped[..., self.num_experts :] = False
        return dropped & ~dropped.all(-1, keepdim=True)

    def balance_loss(self, gate_weights: Tensor) -> Tensor:
        """Sum over positions of E * <load, gate weights>: pushes weight off experts that have
        carried much of late.

        The load is that of *past* steps over the whole batch, so the term is a plain sum over
        positions, equal for any division of the batch. Balanced experts give
        exactly 1 a position.

        Args:
            gate_weights: [N, E].
        """
        return (
            at_least_fp32(gate_weights) @ self.load.to(at_least_fp32(gate_weights))
        ).sum() * len(self.load)

    @torch.no_grad()
    def update_load(self, mean_gate_weights: Tensor) -> None:
        """Take in one step's mean gate weights [E] over the global batch."""
        self.load.lerp_(mean_gate_weights.to(self.load), 1 - self.LOAD_DECAY)


class SigmoidRouter(Router):
    """Gate whose experts do not compete before they are added up (DeepSeek-V3, arXiv 2412.19437,
    eq. 13 to 15).
    """

    def normalised(self, logits: Tensor) -> Tensor:
        """[..., E], -inf for what is left out -> weights that sum to 1, zero for what is left
        out.
        """
        affinity = torch.sigmoid(logits)
        return affinity / affinity.sum(-1, keepdim=True).clamp(min=torch.finfo(affinity.dtype).tiny)


def router_class(name: str) -> type[Router]:
    """The class that the registry names."""
    router: type[Router] = load(ROUTERS[name].path, "mltfr_dist.models")
    return router
