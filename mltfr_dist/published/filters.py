"""D6: frequency filters over the whole sequence, though every position is scored: each reads the
future.

MLTFR's authors have FMLP-Rec and BSARec so. Their own authors score the last position alone, which
is no defect: `models/fmlp_original.py` and `models/bsarec_original.py`.

Shapes: B users, L positions, D hidden size.
"""

from __future__ import annotations

from torch import Tensor, nn

from mltfr_dist.config import BackboneConfig
from mltfr_dist.models.bsarec import BSARec, low_pass_matrix
from mltfr_dist.models.fmlp import FMLPRec, SequenceFilter, convolved


class CircularFilter(SequenceFilter):
    """A convolution that wraps around: y_t = sum over all s of kernel_(t - s) x_s, modulo
    max_len.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        return convolved(x, self.kernel, len(self.kernel))


class CircularFMLPRec(FMLPRec):
    """FMLP-Rec with circular filters."""

    def make_filter(self, config: BackboneConfig, max_len: int) -> nn.Module:
        """[B, L, D] -> [B, L, D]."""
        return CircularFilter(config.hidden_dim, max_len)


class WholeSequenceBSARec(BSARec):
    """BSARec whose low frequencies are those of the whole sequence; padding, behind the history,
    counts as zeros.
    """

    def low_pass(self, max_len: int, num_frequencies: int) -> Tensor:
        """[max_len, max_len]."""
        return low_pass_matrix(max_len, num_frequencies)
