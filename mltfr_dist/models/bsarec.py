"""BSARec (Shin et al. 2024, arXiv 2312.10325): a frequency filter beside self-attention, here
*causal*.

A layer gives alpha * A(x) + (1 - alpha) * attention(x). A splits x into its c lowest Fourier
components and the rest, and rescales the rest: norm(x + low(x) + beta^2 (x - low(x))), beta learned
per channel. Published, the transform runs over the whole sequence of L positions, padded in front,
and the loss is taken at the last position alone, one sample a prefix. MLTFR's authors take it at
every position, so each reads the future (docs/method.md).

Departure: the loss is taken at every position, and low(x)_t is what the published filter gives at
the last position of the prefix 0..t, zeros in front of it up to L: a sum of x_s over s <= t with
weights that depend on t - s alone. In the first layer that is theirs for every prefix; in the next
ones it reads what earlier positions knew then, where theirs lets these see the whole prefix first.
``backbone.bsarec.low_frequencies`` counts components: 3 is the released code's `c` of 5 (it keeps
c // 2 + 1). No dropout on attention weights, a norm behind the last block, and positions that count
from the oldest item.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mltfr_dist.config import BackboneConfig
from mltfr_dist.errors import CheckpointError
from mltfr_dist.models.backbone import PositionalBackbone
from mltfr_dist.models.dropout import Dropout
from mltfr_dist.models.packing import Packing
from mltfr_dist.models.transformer import SelfAttention


def low_pass_matrix(max_len: int, num_frequencies: int) -> Tensor:
    """[L, L] that takes whole sequences to their ``num_frequencies`` lowest components: what
    stands at row t and column s depends on t - s alone, modulo L.
    """
    spectrum = torch.fft.rfft(torch.eye(max_len, dtype=torch.float64), dim=0)
    spectrum[num_frequencies:] = 0
    matrix: Tensor = torch.fft.irfft(spectrum, n=max_len, dim=0)
    return matrix.float()


class FrequencyFilter(nn.Module):
    """Split into low and high frequencies, the high ones rescaled."""

    low_pass: Tensor
    """[max_len, max_len]; kept with the weights, which were trained with it."""

    def __init__(self, hidden_dim: int, low_pass: Tensor) -> None:
        """Args: hidden_dim: D; low_pass: [max_len, max_len] what low-passes a sequence."""
        super().__init__()
        self.register_buffer("low_pass", low_pass)
        self.beta = nn.Parameter(torch.randn(hidden_dim))

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """[N, D] -> [N, D]."""
        padded = packing.unpack(x)  # [B, L, D]
        length = padded.shape[1]
        low = packing.pack(self.low_pass[:length, :length].to(x.dtype) @ padded)
        return low + self.beta.square() * (x - low)

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        if f"{prefix}low_pass" not in state:
            raise CheckpointError(
                "This model's BSARec was trained by an older release of mltfr_dist, without its "
                "low-pass filter beside the weights.",
                rule="The filter was another then, so that histories shorter than data.max_len "
                "would get other scores.",
                remedy="Use the mltfr_dist release that wrote it, or train it anew.",
            )
        super()._load_from_state_dict(state, prefix, *rest)


class BSARecBlock(nn.Module):
    """Frequency filter and causal self-attention side by side, then a feed-forward; post-norm, as
    published.
    """

    def __init__(
        self, config: BackboneConfig, frequency_filter: nn.Module, weight_dropout: float = 0.0
    ) -> None:
        """Args: config: sizes; frequency_filter: (x [N, D], packing) -> [N, D]; weight_dropout: on
        attention weights.
        """
        super().__init__()
        dim = config.hidden_dim
        self.inductive_bias = config.bsarec.inductive_bias
        self.filter = frequency_filter
        self.filter_norm = nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, config.num_heads, weight_dropout=weight_dropout)
        self.attention_norm = nn.LayerNorm(dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)
        )
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """[N, D] -> [N, D]."""
        filtered = self.filter_norm(x + self.dropout(self.filter(x, packing)))
        attended = self.attention_norm(x + self.dropout(self.attention(x, packing)))
        x = self.inductive_bias * filtered + (1 - self.inductive_bias) * attended
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))  # type: ignore[no-any-return]


class BSARec(PositionalBackbone):
    """Beyond self-attention."""

    def make_block(self, config: BackboneConfig, max_len: int) -> nn.Module:
        """Filter beside attention."""
        low_pass = self.low_pass(max_len, config.bsarec.low_frequencies)
        return BSARecBlock(config, FrequencyFilter(config.hidden_dim, low_pass))

    def low_pass(self, max_len: int, num_frequencies: int) -> Tensor:
        """[max_len, max_len] what low-passes a sequence: a position reads the past alone."""
        return low_pass_matrix(max_len, num_frequencies).tril()
