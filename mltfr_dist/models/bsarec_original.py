"""BSARec (Shin et al. 2024, arXiv 2312.10325) as its authors' code has it.

Their filter over the whole sequence that is padded in front, read and trained at its last position
(`padded.py` says what differs), with dropout on attention weights (of `backbone.dropout`, where
theirs is a value of its own). Their loss is `cross_entropy`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mltfr_dist.config import BackboneConfig
from mltfr_dist.models.bsarec import BSARecBlock
from mltfr_dist.models.packing import Packing
from mltfr_dist.models.padded import PaddedBackbone
from mltfr_dist.numerics import at_least_fp32


class WholeFrequencyFilter(nn.Module):
    """The split of whole sequences of one length into low and high frequencies, the high ones
    rescaled.
    """

    def __init__(self, hidden_dim: int, num_frequencies: int) -> None:
        super().__init__()
        self.num_frequencies = num_frequencies
        self.beta = nn.Parameter(torch.randn(hidden_dim))

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """[N, D] -> [N, D]."""
        padded = at_least_fp32(packing.unpack(x))  # [B, W, D]
        lowest = torch.fft.rfft(padded, dim=1)[:, : self.num_frequencies]
        low = packing.pack(torch.fft.irfft(lowest, n=padded.shape[1], dim=1)).to(x.dtype)
        return low + self.beta.square() * (x - low)


class OriginalBSARec(PaddedBackbone):
    """Beyond self-attention, over whole sequences."""

    def make_block(self, config: BackboneConfig, max_len: int) -> nn.Module:
        """Filter beside attention."""
        whole = WholeFrequencyFilter(config.hidden_dim, config.bsarec.low_frequencies)
        return BSARecBlock(config, whole, weight_dropout=config.dropout)
