"""What is done between the stages, as published where a run has that."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from mltfr_dist.config import PublishedConfig
from mltfr_dist.data.stream.training import StepBatches
from mltfr_dist.models.consensus import State, merge
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.models.selectors import Reduce
from mltfr_dist.published.consensus import batch_mean_squares, merge_unnormalised


class Procedure(NamedTuple):
    """What is done between the stages."""

    fisher: Callable[[Recommender, Iterable[StepBatches], Reduce, int], list[State]]
    """Of the model's experts, over this rank's share of the steps, so many samples."""
    merge: Callable[[list[State], list[State]], State] = merge
    """Experts and their Fishers to the consensus expert."""
    merged_from: Callable[[Callable[[], Path], Path], Path] = lambda best, last: best()
    """Which checkpoint's experts, of the best and the last."""
    second_start: Callable[[State, Callable[[], State]], State] = lambda new, best: new | best()
    """What stage 2 starts from, of a new initialisation and stage 1's best weights."""


def published_procedure(
    published: PublishedConfig, repaired: Procedure, heartbeat: Callable[[], object]
) -> Procedure:
    """``repaired`` with its defects; ``heartbeat`` is called as the work goes on."""
    procedure = repaired
    if published.batch_mean_fisher:
        procedure = procedure._replace(
            fisher=lambda model, steps, reduce, _: batch_mean_squares(
                model, steps, reduce, heartbeat
            )
        )
    if published.unnormalised_fisher:
        procedure = procedure._replace(merge=merge_unnormalised)
    if published.fisher_at_last_epoch:
        procedure = procedure._replace(merged_from=lambda best, last: last)
    if published.fresh_start:
        procedure = procedure._replace(second_start=lambda new, best: new)
    return procedure
