"""Dropout whose masks cost little on a CPU, where torch's generator takes a tenth of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mltfr_dist.models.kernels import draw_masks

LARGEST = (1 << 31) - 1
STREAMS = 8
"""Generators that take turns in a mask, so that one register goes on with all of them."""


class Dropout(nn.Dropout):
    """Zeroes numbers with probability p in training and divides the others by 1 - p.

    A mask follows from the state of torch's generator, as with ``nn.Dropout``; training sets that
    from (seed, stage, step, rank) before each step, so a resumed run draws the same.
    """

    def forward(self, input: Tensor) -> Tensor:
        """[...] -> [...]."""
        if not self.training or self.p == 0:
            return input
        if input.device.type != "cpu":
            return F.dropout(input, self.p)
        return input * scaled_masks([input.shape], [self.p])[0].to(input.dtype)


def masks(dropouts: Sequence[Dropout], shapes: Sequence[Sequence[int]]) -> list[Tensor | None]:
    """What each of the ``dropouts`` would multiply fp32 numbers of its shape with on the CPU, one
    drawn after another; None: with 1.
    """
    active = [dropout.training and dropout.p > 0 for dropout in dropouts]
    wanted = [(shape, d.p) for shape, d, on in zip(shapes, dropouts, active, strict=True) if on]
    if not wanted:
        return [None] * len(dropouts)
    drawn = iter(scaled_masks([shape for shape, _ in wanted], [p for _, p in wanted]))
    return [next(drawn) if on else None for on in active]


def scaled_masks(shapes: Sequence[Sequence[int]], ps: Sequence[float]) -> list[Tensor]:
    """fp32 of each of the ``shapes``: zero with probability p, otherwise 1 / (1 - p); on the CPU.

    The numbers are those of eight SFC64 (Doty-Humphrey 2010) in turn, far faster than torch's
    Mersenne twister; the seed of the first is one draw from torch's generator, the others' follow.
    """
    seeds = torch.randint(1 << 62, (len(shapes),)).tolist()
    thresholds, scales = [int((1 - p) * LARGEST) for p in ps], [1 / (1 - p) for p in ps]
    drawn = draw_masks(seeds, thresholds, scales, shapes)
    if drawn is not None:
        return drawn
    each = zip(seeds, thresholds, scales, shapes, strict=True)
    return [_mask_of_numpy(*numbers) for numbers in each]


def _mask_of_numpy(seed: int, threshold: int, scale: float, shape: Sequence[int]) -> Tensor:
    count = math.prod(shape)
    each = -(-count // (2 * STREAMS))
    streams = [np.random.SFC64(seed + s).random_raw(each) for s in range(STREAMS)]
    words = np.stack(streams, axis=1).reshape(-1).view(np.int32)
    uniform = torch.from_numpy(words)[:count].bitwise_right_shift_(1).bitwise_and_(LARGEST)
    # Below the threshold a difference is negative: shifted by 31 bits all ones, otherwise zero.
    kept = uniform.sub_(threshold).bitwise_right_shift_(31)
    bits = int(np.float32(scale).view(np.int32))
    return kept.bitwise_and_(bits).view(torch.float32).view(*shape)
