"""Workers that start while the sweep does. Their imports take longer than all else before a first
trial's first step; so they begin at once, and the process that watches the trial finds them ready.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train.v2._internal.execution.worker_group.worker import ActorMetadata, RayTrainWorker
from ray.train.v2._internal.util import bundle_to_remote_args
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from mltfr_dist.tuning.rank import import_training


@dataclass(frozen=True)
class EarlyGroup:
    """The workers of a trial, by rank, which belong to whoever takes them first."""

    placement_group: PlacementGroup
    actors: tuple[Any, ...]
    claim: Path
    """File that is there once they are taken."""

    def take(self) -> list[ActorMetadata] | None:
        """What their processes are, once they have imported what they need; None where another
        process has them, or where one of them is gone.
        """
        try:
            self.claim.touch(exist_ok=False)
        except FileExistsError:
            return None
        try:
            return list(ray.get([actor.get_metadata.remote() for actor in self.actors]))
        except RayActorError:
            remove_placement_group(self.placement_group)
            return None


@contextmanager
def early_groups(
    per_worker: dict[str, float], workers: int, count: int, folder: Path
) -> Iterator[Sequence[EarlyGroup]]:
    """Start the workers of ``count`` trials; at the end those go that are left.

    Args:
        per_worker: Resources of each. No GPUs: which of them a worker has must be known before it
            imports anything.
        workers: Of a trial.
        count: Trials; as many as run at a time, at most: what is reserved here no other can have.
        folder: Of the sweep's Ray.
    """
    folder.mkdir(parents=True, exist_ok=True)
    claims = Path(tempfile.mkdtemp(prefix="early-", dir=folder))
    groups = [start_group(per_worker, workers, claims / str(i)) for i in range(count)]
    try:
        yield groups
    finally:
        for group in groups:
            remove_placement_group(group.placement_group)
        shutil.rmtree(claims, ignore_errors=True)


def start_group(per_worker: dict[str, float], workers: int, claim: Path) -> EarlyGroup:
    """Start the workers of a trial as Ray Train does, and have them import what they need."""
    reserved = placement_group([per_worker] * workers)
    worker_class = ray.remote(**bundle_to_remote_args(per_worker))(RayTrainWorker)
    bundles = [PlacementGroupSchedulingStrategy(reserved, index) for index in range(workers)]
    actors = [worker_class.options(scheduling_strategy=bundle).remote() for bundle in bundles]
    for actor in actors:
        actor.execute.remote(import_training)
    return EarlyGroup(reserved, tuple(actors), claim)
