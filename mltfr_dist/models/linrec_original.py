"""LinRec (Liu et al. 2023, arXiv 2411.01537) as its authors' code has it.

The released code is not what the paper states: it scales each key to length 1 over its own features
(not each column over the positions) and divides the result by sqrt(d). It reads the whole sequence,
the padding behind a history too, in RecBole's SASRec: post-norm blocks with GELU, one sample a
prefix (of any part of a history: `data.long_histories=windows`), the loss at its last item alone.
`padded.py` says what differs; their feed-forward has an inner size of 256, 2 D with their D of 128,
and ours of 4 D.

Shapes: B users, L positions, H heads, d = D / H.
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from mltfr_dist.config import BackboneConfig
from mltfr_dist.models.linrec import CausalLinearAttention
from mltfr_dist.models.packing import Packing
from mltfr_dist.models.padded import PaddedBackbone
from mltfr_dist.models.transformer import PostNormBlock
from mltfr_dist.numerics import at_least_fp32


class WholeLinearAttention(CausalLinearAttention):
    """The released form: the whole sequence, queries and keys of length 1, divided by sqrt(d)."""

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """[N, D] -> [N, D]."""
        head_dim = x.shape[-1] // self.num_heads
        qkv = packing.unpack(self.qkv(x).view(x.shape[0], 3, self.num_heads, head_dim))
        query, key, value = at_least_fp32(qkv).permute(2, 0, 3, 1, 4)  # each [B, H, L, d]
        query, key = F.normalize(F.elu(query), dim=-1), F.normalize(F.elu(key), dim=-1)
        mixed = query @ (key.transpose(2, 3) @ value) / math.sqrt(head_dim)
        mixed = mixed.to(x.dtype).transpose(1, 2).flatten(2)
        return self.out(packing.pack(mixed))  # type: ignore[no-any-return]


class OriginalLinRec(PaddedBackbone):
    """SASRec with linear attention over whole sequences."""

    pads_in_front = False

    def make_block(self, config: BackboneConfig, max_len: int) -> nn.Module:
        """The transformer block with linear attention in place of softmax attention."""
        attention = WholeLinearAttention(config.hidden_dim, config.num_heads)
        return PostNormBlock(config.hidden_dim, config.dropout, attention)
