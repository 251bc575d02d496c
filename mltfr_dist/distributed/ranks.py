"""The processes of a run: who am I, which device is mine, and the few collectives that are not DeepSpeed's own."""

from __future__ import annotations

import logging
import os
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from mltfr_dist.errors import ConfigError, OtherRankError

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

SINGLE_PROCESS = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
"""What DeepSpeed wants to read where no launcher has set it."""


@dataclass(frozen=True)
class Ranks:
    """This process among all."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first_of_node(self) -> bool:
        """Whether this process does what one process of a machine has to do."""
        return os.environ.get("LOCAL_RANK", "0") == "0"

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes."""
        return self.rank == 0

    def say(self, message: str) -> None:
        """Print on rank 0."""
        if self.is_main:
            print(message, flush=True)

    def sum(self, values: Tensor) -> Tensor:
        """Sum of ``values`` over all ranks, on every rank."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        """Elementwise maximum of ``values`` over all ranks, on every rank."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def _reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        reduced = values.to(self.device, copy=True)
        if self.world_size > 1:
            dist.all_reduce(reduced, op=operation)
        return reduced

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier()

    def first_error(self, error: Exception | None) -> None:
        """Raise on every rank if any rank has an error: nobody is left waiting in a collective, and one rank speaks.

        Raises:
            Exception: This rank's error, if no lower rank has one.
            OtherRankError: Another rank's.
        """
        first = -int(self.max(torch.tensor([float(-self.rank if error else -self.world_size)])).item())
        if error is not None and first == self.rank:
            raise error
        if first < self.world_size:
            raise OtherRankError(f"Rank {first} cannot start.", remedy="See its message.")


ALONE = Ranks(0, 1, torch.device("cpu"))
"""One process on the CPU, without a process group."""


def start_ranks(threads: int | None = None) -> Ranks:
    """Join the process group that a launcher (deepspeed, torchrun) has set up, or form one of a single process.

    Args:
        threads: CPU threads of this process; None divides the cores among the node's ranks.

    Raises:
        ConfigError: The launcher's environment is incomplete.
    """
    on_gpu = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")
    if not dist.is_initialized():
        _init_process_group("nccl" if on_gpu else "gloo", launched=_is_launched())
    if "MASTER_ADDR" not in os.environ:
        os.environ.update(SINGLE_PROCESS)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    local_size = int(os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", str(world_size))))
    if on_gpu:
        return Ranks(rank, world_size, torch.device("cuda", torch.cuda.current_device()))
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // local_size))
    return Ranks(rank, world_size, torch.device("cpu"))


def _is_launched() -> bool:
    """Whether a launcher started this process.

    Raises:
        ConfigError: Its environment is incomplete.
    """
    given = [name for name in LAUNCHER_VARIABLES if name in os.environ]
    launched = "RANK" in given and "WORLD_SIZE" in given
    if launched and len(given) < len(LAUNCHER_VARIABLES):
        missing = sorted(set(LAUNCHER_VARIABLES) - set(given))
        raise ConfigError(
            f"The environment sets {', '.join(given)} but not {', '.join(missing)}.",
            rule="A launched process needs all of them.",
            remedy="Start with `deepspeed train.py` or `torchrun train.py`, or unset RANK and WORLD_SIZE for one process.",
        )
    return launched


def _init_process_group(backend: str, *, launched: bool) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if launched:
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)  # no port to collide on
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # DeepSpeed's own calls; nothing a user could change.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\..*` is deprecated", category=FutureWarning)
    # A compiled shared-memory all-reduce for one CPU node: a minute of compilation, and a killed rank leaks its buffers.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=backend, verbose=False)


def stop_ranks() -> None:
    """Leave the launcher's process group.

    A process of its own keeps its group, for DeepSpeed would hold on to a group that is gone and fail in the next run of
    the same process; it only takes back the variables that a child would misread.
    """
    if "MASTER_ADDR" not in os.environ:
        for name in SINGLE_PROCESS:
            os.environ.pop(name, None)
    elif dist.is_initialized():
        dist.destroy_process_group()
