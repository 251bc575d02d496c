"""Backbones as their authors' code has them: whole sequences of max_len, read at the last item.

The three `*_original` backbones that read the future. Every history is padded to max_len, padding
is computed on as items are, positions count along the padded sequence, and no norm follows the last
block. Each position reads later ones, so only the last may be trained (``data.samples=prefixes``).
MLTFR sees the real positions alone, as elsewhere: what it adds is zero at padding.

What differs from the released code of all three, beside random numbers: the padding row of the
item embedding is zero (theirs is drawn at the start and never trained), and padding is no candidate
in the loss. FMLP-Rec and BSARec also train a history's first item after nothing but padding, and
read at most max_len - 1 items in training; here there is at least one input and up to max_len.

Shapes: B users, L positions, W = max_len, R real positions of the batch.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from mltfr_dist.config import BackboneConfig
from mltfr_dist.models.backbone import PositionalBackbone
from mltfr_dist.models.packing import Lengths, Packing, Padded

EPS = 1e-12
"""Of the released layer norms."""


class PaddedBackbone(PositionalBackbone):
    """A stack whose blocks read whole sequences."""

    pads_in_front: ClassVar[bool] = True
    """Where padding goes."""

    def __init__(self, config: BackboneConfig, num_items: int, max_len: int) -> None:
        super().__init__(config, num_items, max_len)
        self.width = max_len
        self.output_norm = nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = EPS

    def pack(self, item_ids: Tensor, lengths: Lengths = None) -> Packing:
        """Whole sequences, padding included."""
        return Padded(item_ids, self.width, lengths, in_front=self.pads_in_front)
