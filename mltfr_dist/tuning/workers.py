"""The processes of a trial's ranks, which serve this process's trials one after the other."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2._internal.execution.worker_group.placement_group_handle import (
    DefaultPlacementGroupHandle,
)
from ray.train.v2._internal.execution.worker_group.state import WorkerGroupState
from ray.train.v2._internal.execution.worker_group.worker import Worker
from ray.util.placement_group import PlacementGroup, PlacementGroupID, remove_placement_group

from mltfr_dist.distributed.signals import request_stop
from mltfr_dist.files import write_atomically
from mltfr_dist.tuning.early_workers import EarlyGroup

INHERITED = dict(os.environ)
"""This process's environment as Ray started it; its workers have that, too."""

_waiting: list[WorkerGroupState] = []
"""Workers that have done with a trial, with their placement group: one group at most."""


class Waiting(WorkerGroupState):  # type: ignore[misc]
    """Workers that are not ended with their trial."""

    def shutdown(self) -> None:
        """Called by Ray Train at a trial's end: they wait for the next."""
        _waiting.append(self)


class Group(WorkerGroup):  # type: ignore[misc]
    """Workers that go on to this process's next trial, where theirs has ended without an error.

    The first ones are those that the sweep has started in advance, or else may be processes that
    Ray has: it has these for one environment.
    """

    early: Sequence[EarlyGroup] = ()
    """Those that the sweep has started in advance."""

    def _create_placement_group(self, *given: Any) -> Any:
        if _waiting or self._take_early():
            return _waiting[0].placement_group_handle
        return super()._create_placement_group(*given)

    def _create_workers(self, *given: Any, **more: Any) -> Any:
        if _waiting:
            return list(_waiting.pop().workers)
        return super()._create_workers(*given, **more)

    def _take_early(self) -> bool:
        for group in self.early:
            metadata = group.take()
            if metadata is None:
                continue
            resources = self.get_worker_group_context().resources_per_worker
            workers = [
                Worker(actor, data, resources, placement_group_bundle_index=index)
                for index, (actor, data) in enumerate(zip(group.actors, metadata, strict=True))
            ]
            handle = DefaultPlacementGroupHandle(group.placement_group)
            ranked = WorkerGroup._assign_worker_ranks(workers)
            _waiting.append(WorkerGroupState(time.monotonic(), handle, ranked, None))
            return True
        return False

    def shutdown(self) -> None:
        """Called by Ray Train at a trial's end."""
        status = self.get_latest_poll_status()
        if status is not None and status.finished and not status.errors:
            self._worker_group_state: WorkerGroupState = Waiting(**vars(self._worker_group_state))
        super().shutdown()

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> dict[str, Any]:
        env = dict(WorkerGroup._get_worker_runtime_env(custom_runtime_env))
        more = {k: v for k, v in env.pop("env_vars").items() if INHERITED.get(k) != v}
        return env | ({"env_vars": more} if more else {})


class TrialWorkers(WorkerGroupCallback):  # type: ignore[misc]
    """The workers of one trial; their placement group is noted in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.workers: list[Worker] = []

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Called by Ray Train once the workers are there."""
        group = worker_group.get_worker_group_state().placement_group_handle.placement_group
        write_atomically(self.path, group.id.hex())
        self.workers = worker_group.get_workers()

    def ask_to_stop(self) -> None:
        """Have the trial save and end at its next step, and its workers wait for another."""
        for worker in self.workers:
            worker.execute_async(request_stop)


def release(path: Path) -> None:
    """Free the placement group that ``path`` names, and with it the workers; nothing where there is
    none.
    """
    if path.exists():
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(path.read_text()))))
        path.unlink()


def release_waiting() -> None:
    """End workers that wait for a trial."""
    while _waiting:
        _waiting.pop().placement_group_handle.shutdown()
