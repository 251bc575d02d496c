"""The processes of a run: who am I, which device is mine, and the few collectives that are not DeepSpeed's own."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore, Store
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.rendezvous import rendezvous

from mltfr_dist.distributed.adoption import adopt_process_group
from mltfr_dist.distributed.devices import sees_gpus, share_of_cores, take_gpu
from mltfr_dist.distributed.last_word import last_word
from mltfr_dist.distributed.launch import expected_rank, is_launched
from mltfr_dist.distributed.watchdog import beat
from mltfr_dist.errors import (
    ConfigError,
    LostRankError,
    MltfrError,
    OtherRankError,
    StoppedError,
    fail,
)
from mltfr_dist.progress import say

T = TypeVar("T")

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
"""Key of the ranks' store that is set once rank 0 has said why the run ends; `mltfr/spoken/RANK` once that rank knows."""

MESSAGE_BYTES = 4096
"""Longest error that one rank tells another."""

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
            say(message)

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
        beat()
        return reduced

    def gather(self, values: Tensor) -> Tensor:
        """[...] of each rank -> [world size, ...] on every rank."""
        own = values.to(self.device)
        gathered = [torch.empty_like(own) for _ in range(self.world_size)]
        if self.world_size > 1:
            dist.all_gather(gathered, own)
        else:
            gathered = [own]
        beat()
        return torch.stack(gathered)

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier()
        beat()

    def main_works(self, work: Callable[[Callable[[], object]], T]) -> T | None:
        """Rank 0 does ``work(goes_on)``, the others wait; all must call.

        At each call of ``goes_on`` every rank notes progress: the work may take longer than `training.hang_seconds`, and yet
        the run ends if rank 0 gets stuck in it.

        Returns:
            What ``work`` returned on rank 0; None on the others.

        Raises:
            MltfrError: See :meth:`first_error`.
        """
        error, result, working = None, None, torch.ones(1)
        if self.is_main:
            try:
                result = work(lambda: self.sum(working))
            except MltfrError as caught:
                error = caught
            self.sum(torch.zeros(1))
        else:
            while self.sum(torch.zeros(1)).item():
                pass
        self.first_error(error)
        return result

    def jointly(self, work: Callable[[], T]) -> T:
        """``work()`` on every rank; if any refuses its input, all do, and none is left waiting in a collective.

        Raises:
            MltfrError: See :meth:`first_error`.
        """
        error: MltfrError | None = None
        try:
            result = work()
        except MltfrError as caught:
            error = caught
        self.first_error(error)
        return result

    def first_error(self, error: MltfrError | None) -> None:
        """Raise on every rank if any rank has an error. Rank 0 speaks, for whoever it is.

        Raises:
            MltfrError: On rank 0: its own error, or what the lowest rank that has one says.
            OtherRankError: On the other ranks.
        """
        first = -int(
            self.max(torch.tensor([float(-self.rank if error else -self.world_size)])).item()
        )
        if first == self.world_size:
            return
        message = self.texts(f"{socket.gethostname()}: {type(error).__name__}: {error}")[first]
        if not self.is_main:
            raise self.one_speaks(MltfrError(message, remedy=""))
        raise error or MltfrError(f"Rank {first} on {message}", remedy="")

    def one_speaks(self, error: MltfrError) -> MltfrError:
        """What a rank should raise where all ranks meet the same error: rank 0 the error, the others silence."""
        return (
            error
            if self.is_main
            else OtherRankError(
                "Rank 0 says why.", remedy="See its message.", exit_code=error.exit_code
            )
        )

    def agree(self, values: Mapping[str, str], *, rule: str, remedy: str) -> None:
        """Make sure that every rank holds the same ``values`` (of the same names).

        Raises:
            ConfigError: Some differ; rank 0 says which, and where.
        """
        digests = [
            int.from_bytes(hashlib.sha256(text.encode()).digest()[:7]) for text in values.values()
        ]
        differs = self.gather(torch.tensor(digests, dtype=torch.int64))
        differs = (differs != differs[0]).cpu()  # [W, values]
        if not differs.any():
            return
        hosts = self.texts(socket.gethostname())
        names = [
            name
            for name, differing in zip(values, differs.any(0).tolist(), strict=True)
            if differing
        ]
        places = [f"rank {r} ({hosts[r]})" for r in differs.any(1).nonzero()[:, 0].tolist()]
        raise self.one_speaks(
            ConfigError(
                f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} not the same on {', '.join(places)} as on "
                f"rank 0 ({hosts[0]}).",
                rule=rule,
                remedy=remedy,
            )
        )

    def from_main(self, text: str) -> str:
        """Rank 0's text, on every rank."""
        return self.texts(text)[0]

    def texts(self, text: str) -> list[str]:
        """Each rank's text, on every rank; cut at :data:`MESSAGE_BYTES`."""
        encoded = text.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES, b"\0")
        rows = self.gather(torch.tensor(list(encoded), dtype=torch.uint8)).tolist()
        return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]


_meeting: list[Store] = []
"""The store by which the ranks met, from then on."""

ALONE = Ranks(0, 1, torch.device("cpu"))
"""One process on the CPU, without a process group."""


def start_ranks(threads: int | None = None) -> Ranks:
    """Join the ranks that a launcher (deepspeed, torchrun, srun) started, or be the only one.

    A process group that is there already is taken as it is: Ray Train forms it, and so does an earlier run of this process.

    Args:
        threads: CPU threads of this process; None divides the cores among the node's ranks.

    Raises:
        ConfigError: The launcher's environment is incomplete or contradicts itself, or the ranks cannot meet.
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
    ranks = Ranks(rank, world_size, torch.device("cpu"))
    torch.set_num_threads(threads or share_of_cores(ranks.gather, rank))
    return ranks


def _init_process_group(backend: str, *, launched: bool) -> None:
    if torch.cuda.is_available():
        take_gpu(int(os.environ.get("LOCAL_RANK", "0")))
    if launched:
        _meet(backend)
    else:
        dist.init_process_group(  # no port to collide on
            backend, store=HashStore(), rank=0, world_size=1, device_id=_own_gpu()
        )


def _own_gpu() -> torch.device | None:
    """The GPU that NCCL binds this process to; unsaid, it would be guessed at the first barrier."""
    on_gpu = torch.cuda.is_available()
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else None


def _meet(backend: str) -> None:
    """Find the other ranks at MASTER_ADDR:MASTER_PORT and form the process group.

    Raises:
        ConfigError: The port is taken, or not all ranks came.
    """
    place = f"MASTER_ADDR:MASTER_PORT {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
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
            f"Rank {os.environ['RANK']} on {socket.gethostname()} cannot meet the other ranks at {place}: "
            + ("the port is taken." if taken else f"{str(error).splitlines()[0]}."),
            rule=f"Rank 0 listens there, and all {os.environ['WORLD_SIZE']} ranks come within {RENDEZVOUS_SECONDS} s.",
            remedy="Give a free port (`deepspeed --master_port`, `torchrun --master_port`, MASTER_PORT)."
            if taken
            else "Check that every node runs, and reaches that address and port. Where nodes have several networks, set "
            "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the interface between them (`ip -brief address`; slurm/env.sh).",
        ) from None


@contextmanager
def lost_ranks_told() -> Iterator[None]:
    """Say in words that another rank has gone, where the network layer only says that a connection has.

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
            remedy="The other ranks' logs say which failed first; start the same command again and the run goes on from its "
            "last checkpoint.",
        ) from error


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


def say_why(error: MltfrError) -> int:
    """Print why the run ends; returns the exit code.

    Launchers end all ranks once one has left: one that left first, and in silence, would take the reason with it. So the
    others leave after rank 0 has spoken. Before the ranks have met they cannot know, and only give it time; what rank 0 does
    not have to say, such as a file that one node lacks, they then say themselves.
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
    return code


def has_met() -> bool:
    """Whether this process has met others that a launcher started."""
    return bool(_meeting)


def leave(code: int = 0) -> NoReturn:
    """End this process at once, its output written.

    Not by sys.exit: now and then a communication thread outlives its group and aborts the process, which hides the code.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
