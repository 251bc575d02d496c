"""Dropout whose masks cost little on a CPU, where torch's generator takes a tenth of a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mltfr_dist.models.kernels import draw_mask

LARGEST = (1 << 31) - 1


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
        return input * scaled_mask(input.shape, self.p).to(input.dtype)

    def mask(self, shape: Sequence[int]) -> Tensor | None:
        """What :meth:`forward` would multiply fp32 numbers of ``shape`` with on the CPU; None: with
        1.
        """
        return scaled_mask(torch.Size(shape), self.p) if self.training and self.p else None


def scaled_mask(shape: torch.Size, p: float) -> Tensor:
    """fp32 ``shape``: zero with probability p, otherwise 1 / (1 - p); on the CPU.

    The numbers are those of SFC64 (Doty-Humphrey 2010; six times as fast as torch's Mersenne
    twister), seeded by one draw from torch's generator.
    """
    generator = np.random.SFC64(int(torch.randint(1 << 62, ())))
    threshold, scale = int((1 - p) * LARGEST), np.float32(1 / (1 - p))
    drawn = draw_mask(generator, threshold, float(scale), shape)
    if drawn is not None:
        return drawn
    words = generator.random_raw(-(-shape.numel() // 2)).view(np.int32)
    uniform = torch.from_numpy(words)[: shape.numel()].bitwise_right_shift_(1).bitwise_and_(LARGEST)
    # Below the threshold a difference is negative: shifted by 31 bits all ones, otherwise zero.
    kept = uniform.sub_(threshold).bitwise_right_shift_(31)
    return kept.bitwise_and_(int(scale.view(np.int32))).view(torch.float32).view(shape)
