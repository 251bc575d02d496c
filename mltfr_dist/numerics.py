"""Number formats."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_fp32(t: Tensor) -> Tensor:
    """``t`` in fp32 if it is narrower (bf16), as it is otherwise: softmax, logarithms and sums need
    the digits.
    """
    return t.to(torch.promote_types(t.dtype, torch.float32))
