"""Numbers that are not finite, in many tensors at one call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from mltfr_dist.models.kernels.build import pointer, pointers, sizes, usable


def nonfinite(tensors: Sequence[Tensor]) -> Tensor | None:
    """[n] float64: 1 for each of n tensors that holds a number that is not finite, otherwise 0;
    None where there is no kernel for them.
    """
    kernels = usable(*tensors)
    if kernels is None:
        return None
    tensors = [t.contiguous() for t in tensors]
    flags = torch.empty(len(tensors), dtype=torch.float64)
    counts = (ctypes.c_int64 * len(tensors))(*(t.numel() for t in tensors))
    kernels.nonfinite(pointers(tensors), counts, pointer(flags), *sizes(len(tensors)))
    return flags
