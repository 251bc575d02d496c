"""LinRec (Liu et al. 2023, arXiv 2411.01537): L2-normalised linear attention, here in a *causal*
form on SASRec.

Published: rho_1(elu(Q)) (rho_2(elu(K))^T V), rho_1 the L2 norm of each query, rho_2 that of each
*column* of K over the whole sequence, so that the product K^T V comes first and the cost is linear
in the length. Departure: trained at every position, the sums over the whole sequence would show the
future (as would the authors' version on BERT4Rec, by intent). Position t uses the sums over
positions <= t, for K^T V and for the norm of K's columns alike: the published attention of the
prefix that ends at t, read at its last position. Its norm is sqrt(1 + sum of squares): over a
single position the bare norm would leave only each key's sign, a jump at 0 whose gradient blows
rounding errors up.

The released code is not what the paper states, and not this: `linrec_original.py`.

Shapes: B users, L positions, C positions of a chunk, H heads, d = D / H.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mltfr_dist.config import BackboneConfig
from mltfr_dist.models.backbone import PositionalBackbone
from mltfr_dist.models.packing import Packing
from mltfr_dist.models.transformer import TransformerBlock
from mltfr_dist.numerics import at_least_fp32

CHUNK = 64
"""Positions that are mixed by one small product; what lies before them comes in as one [d, d]
state.
"""


class CausalLinearAttention(nn.Module):
    """Multi-head causal linear attention; cost grows linearly with the length."""

    def __init__(self, hidden_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_dim, 3 * hidden_dim)
        self.out = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """[N, D] -> [N, D]; padding stands behind and is never read."""
        heads = self.qkv(x).view(x.shape[0], 3, self.num_heads, x.shape[-1] // self.num_heads)
        mixed = []
        for some, group in packing.divided(heads):
            qkv = at_least_fp32(group.unpack(some))  # [B, L, 3, H, d]
            query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, H, L, d]
            key = F.elu(key)
            column_norms = (1 + key.square().cumsum(2)).sqrt()  # [B, H, L, d] over positions <= t
            query = F.normalize(F.elu(query), dim=-1) / column_norms
            read = causal_product(query, key, value).to(x.dtype)
            mixed.append(group.pack(read.transpose(1, 2).flatten(2)))
        return self.out(torch.cat(mixed))  # type: ignore[no-any-return]


def causal_product(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """y_t = sum over s <= t of (q_t . k_s) v_s, for [B, H, L, d] each, chunk by chunk."""
    state = query.new_zeros(*query.shape[:2], key.shape[-1], value.shape[-1])  # [B, H, d, d]
    mixed = []
    for q, k, v in zip(*(torch.split(t, CHUNK, dim=2) for t in (query, key, value)), strict=True):
        mixed.append(q @ state + (q @ k.transpose(2, 3)).tril() @ v)  # [B, H, C, d]
        state = state + k.transpose(2, 3) @ v
    return torch.cat(mixed, dim=2)


class LinRec(PositionalBackbone):
    """SASRec with L2-normalised linear attention."""

    def make_block(self, config: BackboneConfig, max_len: int) -> nn.Module:
        """The transformer block with linear attention in place of softmax attention."""
        attention = CausalLinearAttention(config.hidden_dim, config.num_heads)
        return TransformerBlock(config.hidden_dim, config.dropout, attention)
