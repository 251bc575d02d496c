"""Exact full-ranking evaluation over all ranks.

Every item is a candidate, except (``filter_seen``) those of the user's own full history; the target
always is one. Shapes: B users of a batch, U users of a split, S slices.
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
from mltfr_dist.training.evaluating.placing import Placer, excluded

ALL = "all"
Members = Callable[[RankingBatch], Tensor]
"""A ranking batch -> [B, S] bool, which users belong to which of S slices."""
Keep = Callable[[Tensor], object]
"""Takes the ranks [U] of all users of a split, in its order, on every rank."""


class Ranked(NamedTuple):
    """Where each user's target stands: all that metrics are made of, the same on every rank."""

    ranks: Tensor
    """[U] float64 in the order of the split; 1 is the best, half-integral where ties count as their
    middle.
    """
    members: Tensor
    """[U, S] bool, which users belong to which slices."""

    def metrics(self, cutoffs: Sequence[int], slice_number: int | None = None) -> dict[str, float]:
        """Metric name to mean over users (of one slice, where asked for); 0 where there is none."""
        ranks = self.ranks if slice_number is None else self.ranks[self.members[:, slice_number]]
        return {name: v / max(1, len(ranks)) for name, v in metric_sums(ranks, cutoffs).items()}


@torch.no_grad()
def rank_users(
    place: Placer,
    stream: Iterable[RankingBatch],
    config: EvaluationConfig,
    ranks: Ranks,
    members: Members | None = None,
) -> Ranked:
    """Rank every user's target among all candidates; all ranks must call.

    Args:
        place: The model, or a baseline.
        stream: This rank's users; the ranks' streams together hold every user once.
        config: The rules for ties and seen items.
        ranks: All processes.
        members: Says who belongs to which slice; None: there are none.

    Returns:
        All users of all ranks. Neither batches nor the number of ranks change their order or ranks
        (but for what they change of hidden states, in the last bits).
    """
    numbers, found, groups = [], [], []
    for batch in stream:
        heartbeat()
        batch = batch.to(ranks.device)
        places = place(batch, excluded(batch, filter_seen=config.filter_seen))
        present = batch.target_ids != PADDING_IDX
        as_they_come = torch.zeros_like(batch.target_ids)
        numbers.append((as_they_come if batch.numbers is None else batch.numbers)[present])
        found.append(target_ranks(places.better, places.equal, config.ties)[present])
        nothing = present.new_zeros(len(present), 0)
        groups.append((nothing if members is None else members(batch))[present])
    everyone, user_ranks, of_slices = (
        of_all_ranks(torch.cat(parts), ranks) for parts in (numbers, found, groups)
    )
    order = everyone.argsort(stable=True)
    return Ranked(user_ranks[order], of_slices[order].bool())


def evaluate(
    place: Placer,
    stream: Iterable[RankingBatch],
    config: EvaluationConfig,
    ranks: Ranks,
    keep: Keep | None = None,
) -> dict[str, float]:
    """:func:`rank_users`, as metrics: name to mean over users; ``keep`` takes the ranks."""
    found = rank_users(place, stream, config, ranks)
    if keep is not None:
        keep(found.ranks)
    return found.metrics(config.cutoffs)


def evaluate_slices(
    place: Placer,
    stream: Iterable[RankingBatch],
    config: EvaluationConfig,
    ranks: Ranks,
    slice_names: Sequence[str],
    members: Members,
    keep: Keep | None = None,
) -> dict[str, dict[str, float]]:
    """:func:`evaluate`, for all users and for slices of them, in one pass.

    Returns:
        "all" and each slice's name to its metrics; a slice's also hold ``users``, their number.
    """
    found = rank_users(place, stream, config, ranks, members)
    if keep is not None:
        keep(found.ranks)
    metrics = {ALL: found.metrics(config.cutoffs)}
    for number, name in enumerate(slice_names):
        size = float(found.members[:, number].sum())
        metrics[name] = found.metrics(config.cutoffs, number) | {"users": size}
    return metrics


def of_all_ranks(own: Tensor, ranks: Ranks) -> Tensor:
    """[n, ...] of each rank, of different n -> all of them, on the CPU of every rank."""
    own = own.to(torch.uint8) if own.dtype == torch.bool else own
    sizes = ranks.gather(torch.tensor([len(own)])).flatten().tolist()
    padding = [0, 0] * (own.dim() - 1) + [0, max(sizes) - len(own)]
    gathered = ranks.gather(F.pad(own, padding)).cpu()
    return torch.cat([part[:size] for part, size in zip(gathered, sizes, strict=True)])
