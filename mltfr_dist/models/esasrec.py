"""eSASRec (Tikhonovich et al. 2025, arXiv 2508.06450): SASRec's objective, LiGR layers and the
sampled softmax.

A LiGR layer (Borisyuk et al. 2025, arXiv 2502.03417) gates what each sub-layer adds by the stream
itself: x + f(norm(x)) * sigmoid(W x + b), with attention and then a SwiGLU feed-forward (Shazeer
2020) as f.

The loss is chosen by `loss.name=sampled_softmax`. Departures from the paper: negatives are shared
by a global batch and corrected by logQ, where the paper draws them for each position; an input
layer norm and a final one, as in our SASRec; positions count from the oldest item; no dropout on
attention weights.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mltfr_dist.config import BackboneConfig
from mltfr_dist.models.backbone import PositionalBackbone
from mltfr_dist.models.dropout import Dropout
from mltfr_dist.models.packing import Packing
from mltfr_dist.models.transformer import SelfAttention


class SwiGLU(nn.Module):
    """Gated feed-forward of inner size 4 D: W_o (silu(W_g x) * W_i x)."""

    def __init__(self, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.gate_and_inner = nn.Linear(hidden_dim, 8 * hidden_dim, bias=False)
        self.dropout = Dropout(dropout)
        self.out = nn.Linear(4 * hidden_dim, hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[N, D] -> [N, D]."""
        gate, inner = self.gate_and_inner(x).chunk(2, dim=-1)  # each [N, 4 D]
        return self.out(self.dropout(F.silu(gate) * inner))  # type: ignore[no-any-return]


class LiGRBlock(nn.Module):
    """Causal attention and SwiGLU, each joining the stream through a gate."""

    def __init__(self, hidden_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_dim)
        self.attention = SelfAttention(hidden_dim, num_heads)
        self.attention_gate = nn.Linear(hidden_dim, hidden_dim)
        self.feed_forward_norm = nn.LayerNorm(hidden_dim)
        self.feed_forward = SwiGLU(hidden_dim, dropout)
        self.feed_forward_gate = nn.Linear(hidden_dim, hidden_dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """[N, D] -> [N, D]."""
        x = x + self.dropout(
            self.attention(self.attention_norm(x), packing) * torch.sigmoid(self.attention_gate(x))
        )
        return x + self.dropout(  # type: ignore[no-any-return]
            self.feed_forward(self.feed_forward_norm(x)) * torch.sigmoid(self.feed_forward_gate(x))
        )


class ESASRec(PositionalBackbone):
    """SASRec with LiGR layers."""

    def make_block(self, config: BackboneConfig, max_len: int) -> nn.Module:
        """A LiGR layer."""
        return LiGRBlock(config.hidden_dim, config.num_heads, config.dropout)
