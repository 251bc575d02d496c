"""How the ranks of a launcher meet, tell why they end, and part."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, Store
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.rendezvous import rendezvous

from mltfr_dist.distributed.adoption import adopt_process_group
from mltfr_dist.distributed.devices import sees_gpus, share_of_cores, take_gpu, uses_gpus
from mltfr_dist.distributed.freed_memory import keep_freed_memory
from mltfr_dist.distributed.last_word import last_word
from mltfr_dist.distributed.launch import expected_rank, is_launched
from mltfr_dist.distributed.processes import machine
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.distributed.shared_memory import SharedMemory
from mltfr_dist.distributed.signals import ended_by_signals
from mltfr_dist.errors import (
    ConfigError,
    LostRankError,
    MltfrError,
    OtherRankError,
    StoppedError,
    fail,
)
from mltfr_dist.models.kernels.build import library

RENDEZVOUS_SECONDS = 300
"""How long the ranks wait for each other at the start."""

COLLECTIVE_TIMEOUT = timedelta(days=7)
"""How long a collective may take. The watchdog ends a run that hangs much sooner, and it knows
stopped from stuck, which a collective's own clock does not."""

SPEAK_SECONDS = 30.0
"""How long a rank that ends leaves rank 0 to say why."""

HEAR_SECONDS = 5.0
"""How long rank 0, which may hold the store, then waits for the others to have seen it."""

SPOKEN = "mltfr/spoken"
"""Key of the ranks' store that is set once rank 0 has said why the run ends; `mltfr/spoken/RANK`
once that rank knows.
"""

SINGLE_PROCESS = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
"""What DeepSpeed wants to read where no launcher has set it."""


APART = "apart"
"""Of ranks that stand on several machines or have no kernels."""

_meeting: list[Store] = []
"""The store by which the ranks met, from then on."""


def start_ranks(threads: int | None = None) -> Ranks:
    """Join the ranks that a launcher (deepspeed, torchrun, srun) started, or be the only one.

    A process group that is there already is taken as it is: Ray Train forms it, and so does an
    earlier run of this process.

    Args:
        threads: CPU threads of this process; None divides the cores among the node's ranks.

    Raises:
        ConfigError: The launcher's environment is incomplete or contradicts itself, or the ranks
            cannot meet.
    """
    on_gpu = sees_gpus()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")
    if not dist.is_initialized():
        _init_process_group("nccl" if on_gpu else "gloo", launched=is_launched())
    adopt_process_group()
    if "RANK" not in os.environ:
        os.environ.update(SINGLE_PROCESS)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))
    if on_gpu:
        return Ranks(rank, world_size, torch.device("cuda", torch.cuda.current_device()))
    keep_freed_memory()
    ranks = Ranks(rank, world_size, torch.device("cpu"))
    torch.set_num_threads(threads or share_of_cores(ranks.gather, rank))
    return replace(ranks, shared=_share_memory(ranks)) if world_size > 1 else ranks


def _share_memory(ranks: Ranks) -> SharedMemory | None:
    """Memory of all ranks, where all are processes of one machine and have the kernels; otherwise
    None, on every rank. All ranks must call.
    """
    kernels = library()
    here = machine() if kernels is not None else ""
    file: int | str = "none"
    if ranks.is_main and here:
        try:
            file = os.memfd_create("mltfr_dist")  # has no name, and is gone with its users
        except OSError as error:
            file = f"none ({error.strerror})"
    there, _, path = ranks.from_main(f"{here}\n/proc/{os.getpid()}/fd/{file}").partition("\n")
    shared, reason = None, APART
    if kernels is not None and here and here == there:
        try:
            own = os.open(path, os.O_RDWR) if isinstance(file, str) else file
            shared, reason = SharedMemory(kernels, own, ranks.rank, ranks.world_size), ""
        except OSError as error:  # no right to open it, no memory, no locks
            reason = f"rank {ranks.rank}: {error}"
    reasons = {text for text in ranks.texts(reason) if text}
    if reasons and APART not in reasons:
        ranks.say(
            "The ranks of this machine cannot share memory and exchange their sums by gloo, and "
            f"slower: {min(reasons)}."
        )
    return None if reasons else shared


def _init_process_group(backend: str, *, launched: bool) -> None:
    if uses_gpus():
        take_gpu(int(os.environ.get("LOCAL_RANK", "0")))
    if launched:
        with ended_by_signals():  # by default: Python would take one only once they have met
            _meet(backend)
    else:
        dist.init_process_group(  # no port to collide on
            backend, store=HashStore(), rank=0, world_size=1, device_id=_own_gpu()
        )


def _own_gpu() -> torch.device | None:
    """The GPU that NCCL binds this process to; unsaid, it would be guessed at the first barrier."""
    on_gpu = uses_gpus()
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else None


def _meet(backend: str) -> None:
    """Find the other ranks at MASTER_ADDR:MASTER_PORT and form the process group.

    Raises:
        ConfigError: The port is taken, or not all ranks came.
    """
    address = f"MASTER_ADDR:MASTER_PORT {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, rank, world_size = next(
            iter(rendezvous("env://", timeout=timedelta(seconds=RENDEZVOUS_SECONDS)))
        )
        _meeting.append(store)
        within = timedelta(seconds=RENDEZVOUS_SECONDS)
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=within,
            device_id=_own_gpu(),
        )
        _set_pg_timeout(COLLECTIVE_TIMEOUT)  # from here on the watchdog judges
    except (dist.DistError, ValueError, RuntimeError) as error:
        taken = "EADDRINUSE" in str(error)
        raise ConfigError(
            f"Rank {os.environ['RANK']} on {socket.gethostname()} cannot meet the other ranks at "
            f"{address}: " + ("the port is taken." if taken else f"{str(error).splitlines()[0]}."),
            rule=f"Rank 0 listens there, and all {os.environ['WORLD_SIZE']} ranks come within "
            f"{RENDEZVOUS_SECONDS} s.",
            remedy="Give a free port (`deepspeed --master_port`, `torchrun --master_port`, "
            "MASTER_PORT)."
            if taken
            else "Check that every node runs, and reaches that address and port. Where nodes have "
            "several networks, set "
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface between them (`ip -brief "
            "address`; slurm/env.sh).",
        ) from None


@contextmanager
def lost_ranks_told() -> Iterator[None]:
    """Say in words that another rank has gone, where the network layer only says that a connection
    has.

    Raises:
        LostRankError: In place of that error.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise LostRankError(
            f"Rank {expected_rank()} on {socket.gethostname()} has lost another rank: "
            f"{str(error).splitlines()[0]}.",
            rule="No rank can go on without all others.",
            remedy="The other ranks' logs say which failed first; start the same command again and "
            "the run goes on from its "
            "last checkpoint.",
        ) from error


def stop_ranks() -> None:
    """Leave the launcher's process group.

    A process of its own keeps its group, for DeepSpeed would hold on to a group that is gone and
    fail in the next run of the same process; it only takes back the variables that a child would
    misread.
    """
    if "MASTER_ADDR" not in os.environ:
        for name in SINGLE_PROCESS:
            os.environ.pop(name, None)
    elif dist.is_initialized():
        dist.destroy_process_group()


def say_why(error: MltfrError) -> int:
    """Print why the run ends; returns the exit code.

    Launchers end all ranks once one has left: one that left first, and in silence, would take the
    reason with it. So the others leave after rank 0 has spoken. Before the ranks have met they
    cannot know, and only give it time; what rank 0 does not have to say, such as a file that one
    node lacks, they then say themselves.
    """
    rank = expected_rank()
    if rank and not _meeting:
        signal.signal(signal.SIGTERM, lambda *_: leave(error.exit_code))
        time.sleep(SPEAK_SECONDS)
    code = fail(error)
    if not isinstance(error, OtherRankError):
        last_word(error.paragraph, stopped=isinstance(error, StoppedError))
    with suppress(
        dist.DistError
    ):  # a rank that is lost will not hear, or, if it was rank 0, not speak
        for store in _meeting:
            if rank == 0:
                store.set(SPOKEN, "")
                others = range(1, int(os.environ["WORLD_SIZE"]))
                store.wait(
                    [f"{SPOKEN}/{other}" for other in others], timedelta(seconds=HEAR_SECONDS)
                )
            elif isinstance(error, OtherRankError):
                store.wait([SPOKEN], timedelta(seconds=SPEAK_SECONDS))
                store.set(f"{SPOKEN}/{rank}", "")
                # torchrun takes for the cause what failed first, and compares whole seconds.
                time.sleep(1.1)
    return code


def has_met() -> bool:
    """Whether this process has met others that a launcher started."""
    return bool(_meeting)


def leave(code: int = 0) -> NoReturn:
    """End this process at once, its output written.

    Not by sys.exit: now and then a communication thread outlives its group and aborts the process,
    which hides the code.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
