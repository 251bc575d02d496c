"""FMLP-Rec (Zhou et al. 2022, arXiv 2202.13556) as its authors' code has it.

A complex weight N(0, .02) in each part for each frequency of the sequence that is padded in front,
read and trained at its last position (`padded.py` says what differs). Their loss is `bce`, with one
negative outside the prefix and its target; ours are outside the user's whole history.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mltfr_dist.config import BackboneConfig
from mltfr_dist.models.fmlp import FilterBlock
from mltfr_dist.models.padded import PaddedBackbone
from mltfr_dist.numerics import at_least_fp32


class SpectralFilter(nn.Module):
    """A complex weight for each frequency of the sequence and channel."""

    def __init__(self, hidden_dim: int, max_len: int) -> None:
        super().__init__()
        self.complex_weight = nn.Parameter(0.02 * torch.randn(max_len // 2 + 1, hidden_dim, 2))

    def forward(self, x: Tensor) -> Tensor:
        """[B, W, D] -> [B, W, D], W = max_len."""
        spectrum = torch.fft.rfft(at_least_fp32(x), dim=1)
        response = torch.view_as_complex(at_least_fp32(self.complex_weight))
        filtered: Tensor = torch.fft.irfft(spectrum * response, n=x.shape[1], dim=1)
        return filtered.to(x.dtype)


class OriginalFMLPRec(PaddedBackbone):
    """Filter-enhanced MLP over whole sequences."""

    def make_block(self, config: BackboneConfig, max_len: int) -> nn.Module:
        """A filter block."""
        spectral = SpectralFilter(config.hidden_dim, max_len)
        return FilterBlock(config.hidden_dim, config.dropout, spectral)
