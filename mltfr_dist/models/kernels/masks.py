"""Masks of dropout, drawn and scaled in one pass; see ``models/dropout.py``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from mltfr_dist.models.kernels.build import pointers, sizes, usable


def draw_masks(
    seeds: Sequence[int],
    thresholds: Sequence[int],
    scales: Sequence[float],
    shapes: Sequence[Sequence[int]],
) -> list[Tensor] | None:
    """fp32 of each of the ``shapes``: its scale where the next 31 bits of eight SFC64 in turn, the
    first of them ``np.random.SFC64(seed)``, are below its threshold, otherwise 0; None where there
    is no kernel for it.
    """
    kernels = usable()
    if kernels is None:
        return None
    masks = [torch.empty(*shape, dtype=torch.float32, device="cpu") for shape in shapes]
    number = len(masks)
    kernels.draw_masks(
        (ctypes.c_uint64 * number)(*seeds),
        pointers(masks),
        (ctypes.c_int64 * number)(*(mask.numel() for mask in masks)),
        (ctypes.c_int64 * number)(*thresholds),
        (ctypes.c_double * number)(*scales),
        *sizes(number),
    )
    return masks
