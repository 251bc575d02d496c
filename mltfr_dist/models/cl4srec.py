"""CL4SRec (Xie et al. 2022, arXiv 2010.14395): SASRec whose loss also contrasts two augmented views
of each history.

Views are made by cropping, masking and reordering (data/stream/augment.py); the term is
`contrastive`. Departure: a view's negatives are the views of the other sequences of its group
(`backbone.cl4srec.contrast_group`), sequences of like length from one global batch, and not of the
whole batch: the loss is then the same for any division of the batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mltfr_dist.config import BackboneConfig
from mltfr_dist.models.packing import indices_where
from mltfr_dist.models.sasrec import SASRec
from mltfr_dist.numerics import at_least_fp32


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


def contrastive(
    first: Tensor,
    second: Tensor,
    present: Tensor,
    *,
    group_size: int,
    temperature: float,
    num_present: int | None = None,
) -> Tensor:
    """NT-Xent over two views of each sequence (Chen et al. 2020; CL4SRec, Xie et al. 2022), in
    groups.

    A view's positive is the other view of its sequence; its negatives are all views of the other
    sequences of its group. Groups, and not the whole batch, so that the sum does not depend on how
    ranks and micro-batches divide the batch.

    Args:
        first: [P, D] representations of the first views; consecutive ``group_size`` rows are a
            group.
        second: [P, D] of the second views.
        present: [P] bool, False for a row that only fills the batch.
        group_size: Sequences of a group; divides P.
        temperature: Products are divided by it.
        num_present: How many rows are present, where it is known.

    Returns:
        Scalar, in fp32 at least: the sum over present sequences of the mean of both views' losses.
    """
    views = torch.stack([first, second], dim=1)  # [P, 2, D]
    views = views.reshape(-1, 2 * group_size, views.shape[-1])  # [P / g, 2 g, D]
    here = present.repeat_interleave(2).view(views.shape[:2])  # [P / g, 2 g]
    logits = at_least_fp32(views @ views.transpose(1, 2)) / temperature
    numbers = torch.arange(2 * group_size, device=first.device)
    itself = numbers[:, None] == numbers
    logits = logits.masked_fill(itself | ~here[:, None, :], -torch.inf)
    other = (numbers ^ 1).expand(views.shape[:2])  # views 2i and 2i + 1 belong together
    num_kept = None if num_present is None else 2 * num_present  # each has its positive
    kept = indices_where(here, num_kept)
    kept_logits, kept_other = (
        t.flatten(0, 1).index_select(0, kept) for t in (logits, other[..., None])
    )
    losses = torch.logsumexp(kept_logits, dim=1) - kept_logits.gather(1, kept_other)[:, 0]
    return losses.sum() / 2
