"""Number formats, and numbers among others."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_fp32(t: Tensor) -> Tensor:
    """``t`` in fp32 if it is narrower (bf16), as it is otherwise: softmax, logarithms and sums need
    the digits.
    """
    return t.to(torch.promote_types(t.dtype, torch.float32))


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest of ``values`` [S]; sorts nothing."""
    return values.kthvalue(len(values) - k + 1).values
