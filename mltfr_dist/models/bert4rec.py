"""BERT4Rec (Sun et al. 2019, arXiv 1904.06690): a bidirectional transformer that predicts masked
items.

Training masks a share of a sequence's items and scores those positions alone; ranking appends a
mask and reads the state at it. Padding is no key, wherever it stands.

Departures from the paper: pre-norm blocks; no dropout on attention weights; no bias per item on the
scores; where no position is drawn, the last is masked (the paper adds copies of each sequence with
the last item masked). The position table has one position more than max_len, for the mask behind a
full history; in training that position holds the sequence's last item.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mltfr_dist.config import BackboneConfig
from mltfr_dist.data.batch import lengths
from mltfr_dist.models.backbone import PositionalBackbone
from mltfr_dist.models.transformer import SelfAttention, TransformerBlock, init_weights


class BERT4Rec(PositionalBackbone):
    """Bidirectional encoder with a mask item."""

    objective = "cloze"
    num_special_items = 1
    num_special_positions = 1

    def __init__(self, config: BackboneConfig, num_items: int, max_len: int) -> None:
        super().__init__(config, num_items, max_len)
        self.projection = nn.Sequential(nn.Linear(config.hidden_dim, config.hidden_dim), nn.GELU())
        self.projection_norm = nn.LayerNorm(config.hidden_dim)
        self.projection.apply(init_weights)

    def make_block(self, config: BackboneConfig, max_len: int) -> nn.Module:
        """A bidirectional transformer block."""
        attention = SelfAttention(config.hidden_dim, config.num_heads, causal=False)
        return TransformerBlock(config.hidden_dim, config.dropout, attention)

    def for_ranking(self, item_ids: Tensor) -> Tensor:
        """Histories [B, L] -> [B, L + 1] with a mask behind each one's last item."""
        ends = lengths(item_ids)[:, None]
        return F.pad(item_ids, (0, 1)).scatter(1, ends, torch.full_like(ends, self.num_items + 1))

    def finish(self, hidden: Tensor) -> Tensor:
        """Final norm and the paper's projection, [N, D]."""
        return self.projection_norm(self.projection(self.output_norm(hidden)))  # type: ignore[no-any-return]
