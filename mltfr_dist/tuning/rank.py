"""One rank of a trial, in a process that Ray has started: the run that train.py would make.

The process serves trial after trial, for its start and imports take longer than a small trial's
training: each leaves it as it was found.
"""

from __future__ import annotations

import fcntl
import gc
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

from ray.train import get_context

from mltfr_dist.config import RunConfig
from mltfr_dist.errors import ConfigError, OtherRankError, StoppedError
from mltfr_dist.schema import validate

POLL_SECONDS = 0.5
LOCK_SECONDS = 120.0
"""How long a trial waits for the process of an earlier attempt to be gone."""


def train_worker(given: dict[str, Any]) -> None:
    """Train, as one rank of all. A trial that pauses or was stopped early ends without an error.

    Raises:
        MltfrError: As :func:`~mltfr_dist.training.running.fit.fit`; among them StoppedError, where
            the sweep is asked to stop.
    """
    from mltfr_dist.distributed.signals import pause_after

    os.chdir(given["directory"])
    config, sweep_stops = validate(RunConfig, given["config"], source="the sweep"), given["stop"]
    refuse_if_stopped(Path(sweep_stops))
    from mltfr_dist.training.running.fit import fit  # for seconds

    refuse_if_stopped(Path(sweep_stops))
    with own_state(), told_to_stop(Path(sweep_stops)), one_attempt(Path(given["log"])):
        if given["until"] is not None:
            pause_after(given["until"])
        try:
            fit(config, verify=False, read_test=given["read_test"])
        except (StoppedError, OtherRankError):  # the latter's reason is raised by the first rank
            if Path(sweep_stops).exists():
                raise


def import_training() -> None:
    """Import what a run needs, which takes seconds, before there is one."""
    import mltfr_dist.training.running.fit  # noqa: F401
    from mltfr_dist.distributed.compiler import leave_compiler_out

    leave_compiler_out()  # imports DeepSpeed


def refuse_if_stopped(flag: Path) -> None:
    """End a trial before it begins, in place of a first step.

    Raises:
        StoppedError: The sweep was asked to stop.
    """
    if flag.exists():
        raise StoppedError(
            "The sweep was asked to stop before the trial began.",
            remedy="Start the same command again and it goes on.",
        )


@contextmanager
def own_state() -> Iterator[None]:
    """Begin as a new process would, and leave nothing to the next trial.

    After an error the process ends, so then there is nothing to leave.
    """
    import torch

    from mltfr_dist.distributed.devices import uses_gpus
    from mltfr_dist.distributed.guest import leave_group
    from mltfr_dist.distributed.resources import forget_peak_memory
    from mltfr_dist.distributed.signals import forget_request

    forget_peak_memory()
    forget_request()
    yield
    leave_group()
    gc.collect()
    if uses_gpus():
        torch.cuda.empty_cache()


@contextmanager
def told_to_stop(flag: Path) -> Iterator[None]:
    """Ask this process to save and stop once ``flag`` is there."""
    from mltfr_dist.distributed.signals import request_stop

    over = threading.Event()

    def watch() -> None:
        while not over.wait(POLL_SECONDS):
            if flag.exists():
                request_stop()
                return

    watcher = threading.Thread(target=watch, name="stop", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


@contextmanager
def one_attempt(log: Path) -> Iterator[None]:
    """Rank 0 writes to ``log``, alone: an earlier attempt's process may live on for a moment after
    its driver was killed.

    Raises:
        ConfigError: It does not go.
    """
    if get_context().get_world_rank():
        yield
        return
    with log.open("a", buffering=1) as file:
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"{log} is held by another process since {LOCK_SECONDS:.0f} s.",
                        rule="One process writes a trial's run.",
                        remedy="End the other sweep over this folder.",
                    ) from None
                time.sleep(POLL_SECONDS)
        with redirect_stdout(file):
            yield


def join_group(address: str, port: int, rank: int, backend: str, seconds: int, size: int) -> None:
    """Meet the trial's other ranks, as Ray Train does for PyTorch.

    Args:
        address: Of the first rank's machine.
        port: Free there.
        rank: Of this process.
        backend: `nccl` or `gloo`.
        seconds: How long a collective may take.
        size: Ranks in all.
    """
    from ray.train.torch import config

    os.environ.update({"MASTER_ADDR": address, "MASTER_PORT": str(port)})
    config._set_torch_distributed_env_vars()
    config._setup_torch_process_group(backend, rank, size, "env://", seconds)


@contextmanager
def on_its_device() -> Iterator[None]:
    """With the GPU that Ray gave this process, where it gave one."""
    from ray.train.torch.config import TorchConfigContextManager

    with TorchConfigContextManager():
        yield
