"""Masks of dropout, drawn and scaled in one pass; see ``models/dropout.py``."""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from mltfr_dist.models.kernels.build import pointer, usable


def draw_mask(
    generator: np.random.SFC64, threshold: int, scale: float, shape: torch.Size
) -> Tensor | None:
    """fp32 ``shape``: ``scale`` where the next 31 bits of a fresh generator are below the
    ``threshold``, otherwise 0; None where there is no kernel for it.

    The generator itself is not advanced.
    """
    mask = torch.empty(shape, dtype=torch.float32)
    kernels = usable(mask)
    if kernels is None:
        return None
    state = np.ascontiguousarray(generator.state["state"]["state"], dtype=np.uint64)
    numbers = (ctypes.c_int64(mask.numel()), ctypes.c_int64(threshold), ctypes.c_double(scale))
    kernels.scaled_mask(ctypes.c_void_p(state.ctypes.data), pointer(mask), *numbers)
    return mask
