"""Full-ranking metrics, one line each, and their sums over users.

A user's metric is a sum over the user's targets of what each is worth at its rank, its position
among the user's own and their number. With one target HR@K equals Recall@K, MAP@K is MRR within
K, and the ideal DCG is 1. Shapes: T targets, B of one user each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Ties = Literal["pessimistic", "mean", "optimistic"]


class Targets(NamedTuple):
    """Where users' targets stand, all [T] float64."""

    ranks: Tensor
    """From 1, in the one ranking of all candidates of the user."""
    position: Tensor
    """1 for the user's best target, 2 for the next."""
    of: Tensor
    """How many targets the user has."""

    @staticmethod
    def among(ranks: Tensor, users: Tensor | None) -> Targets:
        """Ranks [T] of the targets of ``users`` [T]; None: each of another user."""
        ranks = ranks.double()
        alone = ranks.new_ones(ranks.shape)
        return Targets(ranks, *((alone, alone) if users is None else within((users,), ranks)))


class Metric(NamedTuple):
    """What a user's metric is made of."""

    value: Callable[[Targets, int], Tensor]
    """Targets and K -> what each adds to its user's metric [T]."""
    what: str
    at_cutoffs: bool = True
    """Whether it is NAME@K for each K of `evaluation.cutoffs`; else it is NAME, and K is 0."""


METRICS: dict[str, Metric] = {
    "HR": Metric(
        lambda t, k: ((t.ranks <= k) & (t.position == 1)).double(),
        "whether a target is in the first K",
    ),
    "NDCG": Metric(
        lambda t, k: (t.ranks <= k).double() / (t.ranks + 1).log2() / ideal(t.of.clamp(max=k)),
        "1 / log2(rank + 1) within K, summed, by that of the best order",
    ),
    "MAP": Metric(
        lambda t, k: (t.ranks <= k).double() * t.position / t.ranks / t.of,
        "precision at each target within K, by the number of targets",
    ),
    "Precision": Metric(
        lambda t, k: (t.ranks <= k).double() / k, "share of the first K that are targets"
    ),
    "Recall": Metric(
        lambda t, k: (t.ranks <= k).double() / t.of, "share of the targets in the first K"
    ),
    "MRR": Metric(
        lambda t, k: (t.position == 1).double() / t.ranks, "1 / rank of the best", at_cutoffs=False
    ),
}


def ideal(number: Tensor) -> Tensor:
    """DCG of the first ``number`` [T] ranks, whole numbers from 1."""
    import torch

    most = int(number.max()) if len(number) else 0
    gains = 1 / (torch.arange(most, device=number.device).double() + 2).log2()
    return gains.cumsum(0)[number.long() - 1]


def metric_names(cutoffs: Sequence[int]) -> list[str]:
    """What is measured at ``cutoffs``: HR@5, NDCG@5, ..., MRR."""
    at = [f"{name}@{k}" for k in cutoffs for name, metric in METRICS.items() if metric.at_cutoffs]
    return at + [name for name, metric in METRICS.items() if not metric.at_cutoffs]


def is_metric(full_name: str) -> bool:
    """Whether ``full_name`` is a metric's, at any K."""
    return full_name.partition("@")[0] in METRICS


def metric_sums(
    ranks: Tensor, cutoffs: Sequence[int], users: Tensor | None = None
) -> dict[str, float]:
    """Sums over users of each of :func:`metric_names`; over the number of users, the metric.

    Equal ranks of users with one target are counted first, and sums are rounded once, so no order
    changes a bit.

    Args:
        ranks: [T] ranks from :func:`target_ranks`.
        cutoffs: The K.
        users: [T] whose each target is; None: each is of another user.
    """
    import torch  # configuration and help texts read this file, and need no torch

    counts = ranks.new_ones((), dtype=torch.int64)
    if users is None:
        ranks, counts = torch.unique(ranks.double(), return_counts=True)
    targets, sums = Targets.among(ranks, users), {}
    for full_name in metric_names(cutoffs):
        name, _, k = full_name.partition("@")
        values = METRICS[name].value(targets, int(k or 0)) * counts
        sums[full_name] = math.fsum(values[values != 0].tolist())
    return sums


def target_ranks(better: Tensor, equal: Tensor, ties: Ties, users: Tensor | None = None) -> Tensor:
    """Rank of each target in the one ranking of all candidates of its user, 1 for the best.

    Among candidates of equal score a user's targets stand last, first, or where they stand in the
    mean of all orders: of n such candidates, t of them targets, the i-th at i (n + 1) / (t + 1).

    Args:
        better: [T] number of candidates of a higher score.
        equal: [T] number of other candidates of the same score.
        ties: Where targets stand among candidates of equal score.
        users: [T] whose each target is; None: each is of another user.

    Returns:
        [T] float64 ranks (with ``ties="mean"`` possibly fractions).
    """
    tied = equal.double() + 1
    if users is None:
        position = of = tied.new_ones(len(tied))
    else:
        position, of = within((users, better), better)  # as many better: they are tied
        tied = tied.maximum(of)
    match ties:
        case "pessimistic":
            return better + tied - of + position
        case "mean":
            return better + position * (tied + 1) / (of + 1)
        case "optimistic":
            return better + position


def within(groups: Sequence[Tensor], by: Tensor) -> tuple[Tensor, Tensor]:
    """Of each of n things the position in its group, from 1, and the group's size, [n] float64.

    Args:
        groups: Keys, each [n]; things whose keys are all equal are a group.
        by: [n] what orders a group; equal ones stay as they come.
    """
    import torch

    order = by.argsort(stable=True)
    for keys in reversed(groups):
        order = order[keys[order].argsort(stable=True)]
    ends = torch.zeros(len(by), dtype=torch.bool, device=by.device)
    for keys in groups:
        ends[1:] |= keys[order][1:] != keys[order][:-1]
    number = ends.cumsum(0)
    sizes = torch.bincount(number)
    positions = torch.arange(1, len(by) + 1, device=by.device) - (sizes.cumsum(0) - sizes)[number]
    position, size = torch.empty_like(by, dtype=torch.float64), torch.empty_like(by).double()
    position[order], size[order] = positions.double(), sizes[number].double()
    return position, size
