"""SASRec (Kang and McAuley 2018, arXiv 1808.09781) as its first code and MLTFR's authors have it.

Item embeddings are scaled by sqrt D before positions are added, and no norm follows. A block is

    n = norm(x);  h = norm(n + attention(queries n, keys and values x));  h + W2 relu(W1 h)

with dropout on the attention's weights and behind W2, an inner size of D, and residuals from the
*normed* input. Embeddings and the attention's input maps start from Xavier's uniform distribution,
other maps from torch's own. Departures: positions count from the oldest item and padding stands
behind (so do MLTFR's authors; Kang and McAuley pad in front), and the padding row is zero.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mltfr_dist.config import BackboneConfig
from mltfr_dist.models.backbone import PositionalBackbone
from mltfr_dist.models.dropout import Dropout
from mltfr_dist.models.initial import ItemEmbedding
from mltfr_dist.models.packing import Packing
from mltfr_dist.models.transformer import attended

EPS = 1e-8
"""Of the layer norms."""


class OriginalBlock(nn.Module):
    """Causal attention and a feed-forward, each with a residual from its normed input."""

    def __init__(self, hidden_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.attention_norm = nn.LayerNorm(hidden_dim, eps=EPS)
        self.query = nn.Linear(hidden_dim, hidden_dim)
        self.key_value = nn.Linear(hidden_dim, 2 * hidden_dim)
        self.out = nn.Linear(hidden_dim, hidden_dim)
        self.feed_forward_norm = nn.LayerNorm(hidden_dim, eps=EPS)
        self.feed_forward = nn.Sequential(
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            Dropout(dropout),
        )

    def reset(self) -> None:
        """The start of its maps: torch's own; of queries, keys and values, as one map, Xavier's."""
        for linear in (self.feed_forward[0], self.feed_forward[2], self.out):
            assert isinstance(linear, nn.Linear)
            linear.reset_parameters()
        bound = math.sqrt(6 / (4 * self.out.in_features))
        for linear in (self.query, self.key_value):
            nn.init.uniform_(linear.weight, -bound, bound)
        for linear in (self.query, self.key_value, self.out):
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """[N, D] -> [N, D]; position t of a history sees its positions <= t, and no padding."""
        normed = self.attention_norm(x)
        maps = torch.cat([self.query(normed), self.key_value(x)], dim=1)  # [N, 3 D]
        head_dim = (
            x.shape[1] // self.num_heads
        )  # said, for a micro-batch may hold no position at all
        qkv = maps.view(x.shape[0], 3, self.num_heads, head_dim)
        dropout_p = self.dropout * self.training
        mixed = self.out(attended(qkv, packing, causal=True, dropout_p=dropout_p))
        h = self.feed_forward_norm(normed + mixed)
        return h + self.feed_forward(h)  # type: ignore[no-any-return]


class OriginalSASRec(PositionalBackbone):
    """Self-attentive sequential recommendation, in its first form."""

    def __init__(self, config: BackboneConfig, num_items: int, max_len: int) -> None:
        super().__init__(config, num_items, max_len)
        del self.input_norm
        self.output_norm = nn.LayerNorm(config.hidden_dim, eps=EPS)
        for block in self.blocks:  # the base class has given its own start to their maps
            assert isinstance(block, OriginalBlock)
            block.reset()
        assert isinstance(self.item_embedding, ItemEmbedding)
        rows, dim = self.item_embedding.weight.shape
        self.item_embedding.reset("uniform", math.sqrt(6 / (rows + dim)))  # Xavier's bound
        nn.init.xavier_uniform_(self.position_embedding.weight)

    def make_block(self, config: BackboneConfig, max_len: int) -> nn.Module:
        """One block."""
        return OriginalBlock(config.hidden_dim, config.num_heads, config.dropout)

    def embed(self, item_ids: Tensor, positions: Tensor) -> Tensor:
        """Item ids [N] and positions [N] -> scaled item + position embeddings [N, D]."""
        scaled = math.sqrt(self.position_embedding.embedding_dim) * self.item_embedding(item_ids)
        inputs: Tensor = self.dropout(scaled + self.position_embedding(positions))
        return inputs
