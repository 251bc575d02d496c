"""CL4SRec (Xie et al. 2022, arXiv 2010.14395): SASRec whose loss also contrasts two augmented views
of each history.

Views are made by cropping, masking and reordering (data/stream/augment.py); the term is
losses.contrastive. Departure: a view's negatives are the views of the other sequences of its group
(`backbone.cl4srec.contrast_group`), sequences of like length from one global batch, and not of the
whole batch: the loss is then the same for any division of the batch.
"""

from __future__ import annotations

from torch import Tensor

from mltfr_dist.config import BackboneConfig
from mltfr_dist.models.losses import contrastive
from mltfr_dist.models.sasrec import SASRec


class CL4SRec(SASRec):
    """SASRec with a mask item, for masked views; ranking never sees it."""

    contrasts_views = True
    num_special_items = 1

    def __init__(self, config: BackboneConfig, num_items: int, max_len: int) -> None:
        super().__init__(config, num_items, max_len)
        self.settings = config.cl4srec

    def contrast(
        self, first: Tensor, second: Tensor, present: Tensor, num_present: int | None = None
    ) -> tuple[Tensor, float]:
        """NT-Xent over the views of each group."""
        total = contrastive(
            first,
            second,
            present,
            group_size=self.settings.contrast_group,
            temperature=self.settings.contrast_temperature,
            num_present=num_present,
        )
        return total, self.settings.contrast_weight
