"""A trial's workers: Ray Train as far as a sweep needs it.

Each process that Ray starts imports PyTorch, which takes as long as a small trial's training; so
none is started that our runs have no use for.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from ray.train import Result, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.callback import RayTrainCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import WorkerGroup, state, worker_group
from ray.util.placement_group import PlacementGroup, PlacementGroupID, remove_placement_group

from mltfr_dist.files import write_atomically
from mltfr_dist.tuning.space import TrialResources

INHERITED = dict(os.environ)
"""This process's environment as Ray started it; its workers have that, too."""


def scaling(resources: TrialResources) -> ScalingConfig:
    """A trial's workers for Ray Train."""
    per_worker = {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})
    return ScalingConfig(
        num_workers=resources.workers, use_gpu=resources.gpus > 0, resources_per_worker=per_worker
    )


NOT_NEEDED = ("PlacementGroupCleanerCallback", "DatasetsCallback")
"""What Ray Train starts for each run, each with a process of its own: see :class:`Trainer`; and
Ray's own data sets.
"""


class Trainer(TorchTrainer):  # type: ignore[misc]
    """Ray Train's trainer without its own watch over placement groups, and without a process of its
    own.

    Ray Train reserves a trial's workers in a placement group that outlives the trial: Ray frees it
    when the whole sweep ends. A detached actor of Ray Train's should free it sooner, but asks the
    dashboard whether the trial is alive, and where there is no dashboard waits for ever. Each trial
    that was stopped early then kept its CPUs, and the next stayed pending until the sweep was
    restored. Here the trial frees its own (:func:`release`).

    Ray Train watches the workers from one more process, which imports PyTorch again before they
    start. The process of :class:`SweepTrial` does nothing but wait, and does it as well.
    """

    def _initialize_and_run_controller(self, **given: Any) -> Result:
        worker_group.SynchronizationActor = Nobody
        state._shutdown_sync_actor = lambda _nobody: None
        controller = Controller(**given | {"scaling_policy": FixedSize(self.scaling_config)})
        asyncio.run(controller.run())
        return controller.get_result()

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        return [
            c for c in super()._create_default_callbacks() if type(c).__name__ not in NOT_NEEDED
        ]


class Nobody:
    """In place of Ray Train's process at which ranks meet to report: ours write files."""

    @classmethod
    def options(cls, **_given: Any) -> type[Nobody]:
        """As of an actor's class."""
        return cls

    @classmethod
    def remote(cls, **_given: Any) -> Nobody:
        """As of an actor's class."""
        return cls()


class FixedSize(FixedScalingPolicy):  # type: ignore[misc]
    """So many workers, without Ray's autoscaler: that would start a process and wait for it."""

    def _send_resource_request(self) -> None:
        pass

    def _maybe_send_resource_request(self) -> None:
        pass

    def _cancel_resource_request(self) -> None:
        pass


class Group(WorkerGroup):  # type: ignore[misc]
    """Workers that may be processes started in advance: Ray has these for one environment."""

    @staticmethod
    def _get_worker_runtime_env(custom_runtime_env: Any) -> dict[str, Any]:
        env = dict(WorkerGroup._get_worker_runtime_env(custom_runtime_env))
        more = {k: v for k, v in env.pop("env_vars").items() if INHERITED.get(k) != v}
        return env | ({"env_vars": more} if more else {})


class Controller(TrainController):  # type: ignore[misc]
    """Ray Train's, over a :class:`Group`."""

    worker_group_cls = Group


class KeepGroup(WorkerGroupCallback):  # type: ignore[misc]
    """Notes the placement group of a trial's workers in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Called by Ray Train once the workers are there."""
        group = worker_group.get_worker_group_state().placement_group_handle.placement_group
        write_atomically(self.path, group.id.hex())


def release(path: Path) -> None:
    """Free the placement group that ``path`` names, and with it the workers; nothing where there is
    none.
    """
    if path.exists():
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(path.read_text()))))
        path.unlink()
