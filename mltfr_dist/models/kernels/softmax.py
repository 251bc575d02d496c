"""Exponentials of logits and their sums, in one pass; see ``models/cross_entropy.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from mltfr_dist.models.kernels.build import pointer, sizes, usable


def exponentials(logits: Tensor, largest: Tensor) -> tuple[Tensor, Tensor] | None:
    """Turn ``logits`` [n, i] into exponentials of what they are above their shifts.

    Args:
        logits: Contiguous; in place.
        largest: [n, 1], of what came before; -inf where nothing did.

    Returns:
        The shifts [n, 1], which are the larger of ``largest`` and each row's largest logit, and the
        sums [n, 1] of the exponentials; None where there is no kernel for it, and then ``logits``
        stay.
    """
    kernels = usable(logits, largest)
    if kernels is None or not logits.is_contiguous():
        return None
    shifts, sums = largest.clone(), torch.empty_like(largest)
    kernels.exponentials(pointer(logits), pointer(shifts), pointer(sums), *sizes(*logits.shape))
    return shifts, sums
