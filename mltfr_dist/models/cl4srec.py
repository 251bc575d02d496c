"""CL4SRec (Xie et al. 2022, arXiv 2010.14395): SASRec whose loss also contrasts two augmented views of each history.

Views are made by cropping, masking and reordering (data/stream/augment.py); the term is losses.contrastive. Departure: a view's
negatives are the views of the other sequences of its group (`loss.contrast_group`), sequences of like length from one global
batch, and not of the whole batch: the loss is then the same for any number of ranks and micro-batches.
"""

from __future__ import annotations

from mltfr_dist.models.sasrec import SASRec


class CL4SRec(SASRec):
    """SASRec with a mask item, for masked views; ranking never sees it."""

    contrasts_views = True
    num_special_items = 1
