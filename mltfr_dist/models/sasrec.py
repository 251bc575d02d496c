"""SASRec (Kang and McAuley 2018, arXiv 1808.09781): a causal transformer over the history.

Departures from the paper, each the common choice of its successors: pre-norm blocks with a GELU feed-forward of inner
size 4 D (the paper: post-norm, ReLU, inner size D), positions counted from the oldest item (padding stands behind), and
a layer norm on the input embeddings.
"""

from __future__ import annotations

from torch import Tensor, nn

from mltfr_dist.config import BackboneConfig
from mltfr_dist.data.batch import PADDING_IDX
from mltfr_dist.models.backbone import Backbone
from mltfr_dist.models.transformer import TransformerBlock, init_weights


class SASRec(Backbone):
    """Self-attentive sequential recommendation."""

    def __init__(self, config: BackboneConfig, num_items: int, max_len: int) -> None:
        super().__init__()
        dim = config.hidden_dim
        self.item_embedding = nn.Embedding(num_items + 1, dim, padding_idx=PADDING_IDX)
        self.position_embedding = nn.Embedding(max_len, dim)
        self.input_norm = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(TransformerBlock(dim, config.num_heads, config.dropout) for _ in range(config.num_layers))
        self.output_norm = nn.LayerNorm(dim)
        self.apply(init_weights)

    def embed(self, item_ids: Tensor, positions: Tensor) -> Tensor:
        """Item ids [N] and positions [N] -> item + position embeddings [N, D]."""
        summed = self.item_embedding(item_ids) + self.position_embedding(positions)
        return self.dropout(self.input_norm(summed))  # type: ignore[no-any-return]

    def finish(self, hidden: Tensor) -> Tensor:
        """Final layer norm, [N, D]."""
        return self.output_norm(hidden)  # type: ignore[no-any-return]
