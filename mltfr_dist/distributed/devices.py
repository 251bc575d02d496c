"""The GPU and the cores of this process."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable

import torch
from torch import Tensor

from mltfr_dist.distributed.launch import SLURM_TASKS
from mltfr_dist.distributed.processes import machine
from mltfr_dist.errors import ConfigError


def uses_gpus() -> bool:
    """Whether this process computes on GPUs: there are some, and DS_ACCELERATOR=cpu does not say
    otherwise.
    """
    return os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()


def sees_gpus() -> bool:
    """Whether this process trains on GPUs.

    Raises:
        ConfigError: Slurm gave it some and torch sees none: it would train on the CPU unnoticed.
    """
    given = os.environ.get("SLURM_STEP_GPUS") if SLURM_TASKS in os.environ else None
    if uses_gpus():
        return True
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""  # Ray, from trials without GPUs
    if given and not hidden and os.environ.get("DS_ACCELERATOR") != "cpu":
        raise ConfigError(
            f"Slurm gave this job step GPU {given} of {socket.gethostname()}, and torch sees none.",
            rule="A run that was given GPUs does not go to the CPU unasked.",
            remedy="Check `nvidia-smi` there and that this torch is built for CUDA, or set "
            "DS_ACCELERATOR=cpu to train on the CPU.",
        )
    return False


def take_gpu(local_rank: int) -> None:
    """Make GPU ``local_rank`` this process's own.

    Raises:
        ConfigError: It does not see so many.
    """
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"Rank {local_rank} of {socket.gethostname()} sees {count} GPU(s).",
            rule="Rank i of a node takes its GPU i, so each must see all of them.",
            remedy="Start one rank a GPU; where you call `srun` yourself, give it --gpus-per-node "
            "and not --gpus-per-task, which shows each rank its own alone.",
        )
    torch.cuda.set_device(local_rank)


def share_of_cores(gather: Callable[[Tensor], Tensor], rank: int) -> int:
    """Cores of this process, divided among the ranks that may use the same ones.

    Launchers may have bound each rank to its own. Where Slurm does not bind, a task still uses no
    more than `--cpus-per-task`: the others may be another job's. All ranks must call.
    """
    cores = sorted(os.sched_getaffinity(0))
    digest = hashlib.sha256(f"{machine() or socket.gethostname()} {cores}".encode()).digest()
    shown = gather(torch.tensor([int.from_bytes(digest[:7])]))
    share = len(cores) // int((shown == shown[rank]).sum())
    given = os.environ.get("SLURM_CPUS_PER_TASK", "") if SLURM_TASKS in os.environ else ""
    return max(1, min(share, int(given) if given.isdecimal() else share))


def local_device() -> torch.device:
    """What a process computes on that meets no others: its own GPU of those it sees, else the CPU.

    Raises:
        ConfigError: A launcher started more processes than there are GPUs.
    """
    if not sees_gpus():
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    take_gpu(local_rank)
    return torch.device("cuda", local_rank)
