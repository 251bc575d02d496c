"""Exact full-ranking evaluation over all ranks.

Every item is a candidate, except (``filter_seen``) those of the user's own full history; targets
always are. That gives one ranking a user, and a target's rank is its place in it: a user's other
targets stand in it as all items do. Shapes: T targets of a batch or of a split, S slices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mltfr_dist.config import EvaluationConfig
from mltfr_dist.data.batch import PADDING_IDX, RankingBatch
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.distributed.watchdog import heartbeat
from mltfr_dist.metrics import metric_sums, target_ranks
from mltfr_dist.training.evaluating.rankers import Ranker, excluded

ALL = "all"
Members = Callable[[RankingBatch], Tensor]
"""A ranking batch -> [T, S] bool, which targets belong to which of S slices."""
Keep = Callable[[Tensor], object]
"""Takes the ranks [T] of all targets of a split, in its order, on every rank."""


class Ranked(NamedTuple):
    """Where each target stands: all that metrics are made of, the same on every rank."""

    ranks: Tensor
    """[T] float64 in the order of the split; 1 is the best, a fraction where ties count as their
    middle.
    """
    members: Tensor
    """[T, S] bool, which targets belong to which slices."""
    users: Tensor
    """[T] ascending, index of each target's user in the split."""

    def of_slice(self, number: int) -> Ranked:
        """A slice's targets alone, as if their users had no others."""
        chosen = self.members[:, number]
        return Ranked(self.ranks[chosen], self.members[chosen], self.users[chosen])

    @property
    def num_users(self) -> int:
        """Users with a target here."""
        return int((self.users.diff(prepend=self.users[:1] - 1) > 0).sum())

    def metrics(self, cutoffs: Sequence[int]) -> dict[str, float]:
        """Metric name to mean over users; 0 where there is none."""
        users = self.users if self.num_users < len(self.users) else None
        sums = metric_sums(self.ranks, cutoffs, users)
        return {name: total / max(1, self.num_users) for name, total in sums.items()}


@torch.no_grad()
def rank_users(
    ranker: Ranker,
    stream: Iterable[RankingBatch],
    config: EvaluationConfig,
    ranks: Ranks,
    members: Members | None = None,
) -> Ranked:
    """Rank every target among all candidates of its user; all ranks must call.

    Args:
        ranker: The model, or a baseline.
        stream: This rank's targets; the ranks' streams together hold every target once. Batches
            without numbers of users are of users of their own.
        config: The rules for ties and seen items.
        ranks: All processes.
        members: Says what belongs to which slice; None: there are none.

    Returns:
        All targets of all ranks. Neither batches nor the number of ranks change their order or
        ranks (but for what they change of hidden states, in the last bits).
    """
    numbers, better, equal, groups, so_far = [], [], [], [], 0
    for batch in stream:
        heartbeat()
        batch = batch.to(ranks.device)
        counts = ranker(batch, excluded(batch, filter_seen=config.filter_seen))
        present = batch.target_ids != PADDING_IDX
        as_they_come = torch.arange(len(batch.item_ids), device=ranks.device) + so_far
        so_far += len(as_they_come)
        users = as_they_come if batch.numbers is None else batch.numbers
        numbers.append(batch.of_targets(users)[present])
        better.append(counts.better[present])
        equal.append(counts.equal[present])
        nothing = present.new_zeros(len(present), 0)
        groups.append((nothing if members is None else members(batch))[present])
    everyone, above, beside, of_slices = (
        of_all_ranks(torch.cat(blocks), ranks) for blocks in (numbers, better, equal, groups)
    )
    order = everyone.argsort(stable=True)
    everyone, above, beside = (t[order] for t in (everyone, above, beside))
    several = bool((everyone[1:] == everyone[:-1]).any())
    ranked = target_ranks(above, beside, config.ties, everyone if several else None)
    return Ranked(ranked, of_slices[order].bool(), everyone)


def evaluate(
    ranker: Ranker,
    stream: Iterable[RankingBatch],
    config: EvaluationConfig,
    ranks: Ranks,
    keep: Keep | None = None,
) -> dict[str, float]:
    """:func:`rank_users`, as metrics: name to mean over users; ``keep`` takes the ranks."""
    ranked = rank_users(ranker, stream, config, ranks)
    if keep is not None:
        keep(ranked.ranks)
    return ranked.metrics(config.cutoffs)


def evaluate_slices(
    ranker: Ranker,
    stream: Iterable[RankingBatch],
    config: EvaluationConfig,
    ranks: Ranks,
    slice_names: Sequence[str],
    members: Members,
    keep: Keep | None = None,
) -> dict[str, dict[str, float]]:
    """:func:`evaluate`, for all targets and for slices of them, in one pass.

    Returns:
        "all" and each slice's name to its metrics; a slice's also hold ``users``, their number.
    """
    ranked = rank_users(ranker, stream, config, ranks, members)
    if keep is not None:
        keep(ranked.ranks)
    metrics = {ALL: ranked.metrics(config.cutoffs)}
    for number, name in enumerate(slice_names):
        of_slice = ranked.of_slice(number)
        metrics[name] = of_slice.metrics(config.cutoffs) | {"users": float(of_slice.num_users)}
    return metrics


def of_all_ranks(own: Tensor, ranks: Ranks) -> Tensor:
    """[n, ...] of each rank, of different n -> all of them, on the CPU of every rank."""
    own = own.to(torch.uint8) if own.dtype == torch.bool else own
    sizes = ranks.gather(torch.tensor([len(own)])).flatten().tolist()
    padding = [0, 0] * (own.dim() - 1) + [0, max(sizes) - len(own)]
    gathered = ranks.gather(F.pad(own, padding)).cpu()
    return torch.cat([rows[:size] for rows, size in zip(gathered, sizes, strict=True)])
