"""FMLP-Rec (Zhou et al. 2022, arXiv 2202.13556): learned filters in place of attention, here
*causal*.

Published: multiply the Fourier transform over the whole sequence by a learned complex weight, which
is a circular convolution with a kernel as long as the sequence: every position reads every other.
Their own loss is taken at the last position alone, one sample a prefix: `fmlp_original.py`.

Departures: the loss is taken at every position; the kernel itself is learned, one of max_len taps a
channel (as many real numbers as the complex weight has), and convolved linearly, through a
zero-padded transform, so that position t reads positions <= t. Taps start at N(0, .02), so that the
filter's gain at a frequency starts at .14 for 50 positions; the published weight starts at .028.
Positions count from the oldest item. Blocks stay as published: post-norm, a feed-forward of inner
size 4 D with GELU; a norm follows the last one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mltfr_dist.config import BackboneConfig
from mltfr_dist.models.backbone import PositionalBackbone
from mltfr_dist.models.dropout import Dropout
from mltfr_dist.models.packing import Packing
from mltfr_dist.numerics import at_least_fp32


class SequenceFilter(nn.Module):
    """A learned causal convolution of each channel, by FFT: L log L products in place of L
    squared.
    """

    def __init__(self, hidden_dim: int, max_len: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(0.02 * torch.randn(max_len, hidden_dim))

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]: y_t = sum over s <= t of kernel_(t - s) x_s."""
        length = x.shape[1]
        # Twice the length leaves room for the whole linear convolution: nothing wraps around.
        return convolved(x, self.kernel[:length], 2 * length)


def convolved(x: Tensor, kernel: Tensor, size: int) -> Tensor:
    """The circular convolution, modulo ``size``, of x [B, L, D] with a kernel [K, D]: its first L
    positions [B, L, D].
    """
    spectrum = torch.fft.rfft(at_least_fp32(x), n=size, dim=1)
    response = torch.fft.rfft(at_least_fp32(kernel), n=size, dim=0)
    filtered: Tensor = torch.fft.irfft(spectrum * response, n=size, dim=1)[:, : x.shape[1]]
    return filtered.to(x.dtype)


class FilterBlock(nn.Module):
    """Filter and feed-forward, each with a residual and a norm behind it."""

    def __init__(self, hidden_dim: int, dropout: float, sequence_filter: nn.Module) -> None:
        """Args: hidden_dim: D; dropout: behind both; sequence_filter: [B, L, D] -> [B, L, D]."""
        super().__init__()
        self.filter = sequence_filter
        self.filter_norm = nn.LayerNorm(hidden_dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(hidden_dim, 4 * hidden_dim), nn.GELU(), nn.Linear(4 * hidden_dim, hidden_dim)
        )
        self.feed_forward_norm = nn.LayerNorm(hidden_dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """[N, D] -> [N, D]."""
        filtered = packing.pack(self.filter(packing.unpack(x)))
        x = self.filter_norm(x + self.dropout(filtered))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))  # type: ignore[no-any-return]


class FMLPRec(PositionalBackbone):
    """Filter-enhanced MLP."""

    def make_block(self, config: BackboneConfig, max_len: int) -> nn.Module:
        """A filter block."""
        return FilterBlock(config.hidden_dim, config.dropout, self.make_filter(config, max_len))

    def make_filter(self, config: BackboneConfig, max_len: int) -> nn.Module:
        """What mixes the positions of a block, [B, L, D] -> [B, L, D]."""
        return SequenceFilter(config.hidden_dim, max_len)
