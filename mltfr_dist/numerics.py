"""Number formats, and numbers among others."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

LARGEST_INT32 = (1 << 31) - 1
GROUP = 8
"""Scores that one maximum stands for while the largest of many are sought."""
HALF_RATE = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
"""Compute capabilities of the GPUs that work in float64 at half their rate in fp32 (P100, V100,
A100, H100, B200); others do at a 32nd of it or less (CUDA C++ Programming Guide, arithmetic
instructions).
"""


@cache
def is_fast_in_float64(device: torch.device) -> bool:
    """Whether products in float64 cost a GPU less than to be asked which of them it needs."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) in HALF_RATE


def at_least_fp32(t: Tensor) -> Tensor:
    """``t`` in fp32 if it is narrower (bf16), as it is otherwise: softmax, logarithms and sums need
    the digits.
    """
    return t.to(torch.promote_types(t.dtype, torch.float32))


def kth_largest(values: Tensor, k: int) -> Tensor:
    """The k-th largest of ``values`` [S]; sorts nothing."""
    return values.kthvalue(len(values) - k + 1).values


def norms(tensors: Sequence[Tensor], order: float = 2.0) -> list[Tensor]:
    """Scalars in fp32: the norm of each of several ``tensors`` on a GPU, 0 of an empty one; by a
    few launches for all that are of one format.
    """
    made: dict[int, Tensor] = {}
    for dtype in {t.dtype for t in tensors}:
        some = {
            i: t if t.numel() else t.new_zeros(1) for i, t in enumerate(tensors) if t.dtype == dtype
        }
        of_some = torch._foreach_norm(
            list(some.values()), order, dtype=torch.promote_types(dtype, torch.float32)
        )
        made |= dict(zip(some, of_some, strict=True))
    return [made[i].float() for i in range(len(tensors))]


def top_of(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """[G, count] largest of ``scores`` [G, S], largest first, and their indices.

    The largest lie in the groups of the largest maxima, so most scores are looked at once, by an
    operation that is fast, and not by the selection, which is slow.
    """
    num_groups = scores.shape[1] // GROUP
    if scores.device.type != "cpu" or num_groups < 16 * count:
        values, indices = scores.topk(count, dim=1)
        return values, indices
    grouped = scores[:, : GROUP * num_groups].view(len(scores), GROUP, num_groups)
    groups = top_of(grouped.amax(dim=1), count)[1]  # [G, count]
    members = torch.arange(GROUP)[:, None] * num_groups
    columns = (groups[:, None, :] + members).flatten(1)  # [G, GROUP * count]
    ungrouped = torch.arange(GROUP * num_groups, scores.shape[1]).expand(len(scores), -1)
    columns = torch.cat([columns, ungrouped], dim=1)
    values, indices = scores.gather(1, columns).topk(count, dim=1)
    return values, columns.gather(1, indices)


def in_order(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Numbers that are ordered as the ``count`` largest of ``scores`` [..., S] (fp32 or narrower),
    largest first, of equal ones the lower index; and these indices. Nobody has to look at how far
    ties reach, so that a GPU is not waited for.
    """
    # A float's bits, read as an integer, are ordered as it is where it is positive, and the other
    # way round where it is negative; -0 becomes +0. The indices are behind them, backwards.
    bits = (at_least_fp32(scores) + 0.0).view(torch.int32)
    ordered = (bits ^ ((bits >> 31) & LARGEST_INT32)).long()
    last = scores.shape[-1] - 1
    backwards = torch.arange(last, -1, -1, device=scores.device)
    keys = torch.add(backwards, ordered, alpha=1 << 32).topk(count, dim=-1).values
    return keys, last - (keys & ((1 << 32) - 1))


def distinct_in_room(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What :func:`torch.unique` gives, with room for as many as there can be, so that a GPU is not
    asked how many there are.

    Args:
        values: [...] int64, of 0 to ``count`` - 1.
        count: Of what there is.

    Returns:
        [U] the distinct ones, ascending, and the largest again in the places that are left, U being
        the number of values or ``count``, the smaller; and ``values`` as indices into them.
    """
    ordered, order = values.flatten().sort()
    is_new = torch.ones_like(ordered, dtype=torch.bool)
    is_new[1:] = ordered[1:] != ordered[:-1]
    places = is_new.cumsum(0) - 1
    distinct = ordered[-1:].repeat(len(ordered)).scatter_(0, places, ordered)
    indices = torch.empty_like(order).scatter_(0, order, places)
    return distinct[:count], indices.view_as(values)
