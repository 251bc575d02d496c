"""A trial's workers: Ray Train as far as a sweep needs it.

Each process that Ray starts imports for seconds, as long as a small trial trains; so none is
started that our runs have no use for, and the watching one does without PyTorch.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import ray
from ray.train import Result, ScalingConfig
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.execution.callback import RayTrainCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group import state, worker_group
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from mltfr_dist.tuning.rank import join_group, on_its_device
from mltfr_dist.tuning.space import TrialResources
from mltfr_dist.tuning.workers import Group


def per_worker(resources: TrialResources) -> dict[str, float]:
    """What a worker holds, by Ray's names."""
    return {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})


def scaling(resources: TrialResources) -> ScalingConfig:
    """A trial's workers for Ray Train."""
    return ScalingConfig(
        num_workers=resources.workers,
        use_gpu=resources.gpus > 0,
        resources_per_worker=per_worker(resources),
    )


NOT_NEEDED = ("PlacementGroupCleanerCallback", "DatasetsCallback")
"""What Ray Train starts for each run, each with a process of its own: see :class:`Trainer`; and
Ray's own data sets.
"""


class Trainer(DataParallelTrainer):  # type: ignore[misc]
    """Ray Train's trainer without its own watch over placement groups, and without a process of its
    own.

    Ray Train reserves a trial's workers in a placement group that outlives the trial: Ray frees it
    when the whole sweep ends. A detached actor of Ray Train's should free it sooner, but asks the
    dashboard whether the trial is alive, and where there is no dashboard waits for ever. Each trial
    that was stopped early then kept its CPUs, and the next stayed pending until the sweep was
    restored. Here the trial frees its own (:func:`~mltfr_dist.tuning.workers.release`).

    Ray Train watches the workers from one more process, which would import everything again before
    they start. The process of :class:`SweepTrial` does nothing but wait, and does it as well.
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


@dataclass
class TorchRanks(BackendConfig):  # type: ignore[misc]
    """PyTorch's process group, as Ray's TorchConfig, of which this process imports nothing."""

    gpus: bool
    """Whether each rank has one."""
    seconds: int
    """How long a collective may take."""

    @property
    def backend_cls(self) -> type[Meeting]:
        """What forms it."""
        return Meeting

    @property
    def train_func_context(self) -> Any:
        """What the training is done in."""
        return on_its_device


class Meeting(Backend):  # type: ignore[misc]
    """Lets the workers form their group; each leaves it itself."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: TorchRanks) -> None:
        """Called by Ray Train once the workers are there."""
        address = worker_group.execute_single(0, get_address_and_port)
        backend = "nccl" if backend_config.gpus else "gloo"
        size = len(worker_group)
        joins = [
            worker_group.execute_single_async(
                rank, join_group, *address, rank, backend, backend_config.seconds, size
            )
            for rank in range(size)
        ]
        ray.get(joins)


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


class Controller(TrainController):  # type: ignore[misc]
    """Ray Train's, over a :class:`~mltfr_dist.tuning.workers.Group`."""

    worker_group_cls = Group
