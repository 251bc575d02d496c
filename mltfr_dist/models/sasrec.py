"""SASRec (Kang and McAuley 2018, arXiv 1808.09781): a causal transformer over the history.

Departures from the paper, each the common choice of its successors: pre-norm blocks with a GELU
feed-forward of inner size 4 D (the paper: post-norm, ReLU, inner size D), positions counted from
the oldest item (padding stands behind), and a layer norm on the input embeddings; no dropout on
attention weights, embeddings that are not scaled by sqrt D, and N(0, .02) as the start of every
map. ``sasrec_original`` has none of these but the order of positions.
"""

from __future__ import annotations

from torch import Tensor, nn

from mltfr_dist.config import BackboneConfig
from mltfr_dist.models.backbone import PositionalBackbone
from mltfr_dist.models.packing import Packing
from mltfr_dist.models.transformer import SelfAttention, TransformerBlock


class SASRec(PositionalBackbone):
    """Self-attentive sequential recommendation."""

    def make_block(self, config: BackboneConfig, max_len: int) -> nn.Module:
        """A causal transformer block."""
        return TransformerBlock(
            config.hidden_dim, config.dropout, SelfAttention(config.hidden_dim, config.num_heads)
        )

    def finish_last(self, hidden: Tensor, layout: Packing) -> Tensor:
        """As ever; on a CPU the last block computes last positions alone (on a GPU launches cost
        more than positions).
        """
        if hidden.device.type != "cpu":
            return super().finish_last(hidden, layout)
        block = self.blocks[-1]
        assert isinstance(block, TransformerBlock)
        return self.finish(block.last(hidden, layout)) * (layout.num_items > 0)[:, None]
