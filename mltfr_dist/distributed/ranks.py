"""The processes of a run: who am I, which device is mine, and the few collectives that are not
DeepSpeed's own.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mltfr_dist.distributed.shared_memory import SharedMemory
from mltfr_dist.distributed.watchdog import heartbeat
from mltfr_dist.errors import (
    ConfigError,
    MltfrError,
    OtherRankError,
)
from mltfr_dist.progress import say

T = TypeVar("T")

MESSAGE_BYTES = 4096
"""Longest error that one rank tells another."""


@dataclass(frozen=True)
class Ranks:
    """This process among all."""

    rank: int
    world_size: int
    device: torch.device
    shared: SharedMemory | None = None
    """Of the ranks, where all stand on one machine and compute on its CPU."""

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
        reduced = values.to(self.device, copy=True).contiguous()
        self.reduce(reduced, operation)
        return reduced

    def reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
        """Contiguous ``values`` of all ranks become one, in place."""
        if self.shared is not None and self.shared.takes([values], operation):
            self.shared.reduce([values], operation)
        elif self.world_size > 1:
            dist.all_reduce(values, op=operation)
        heartbeat()

    def gather(self, values: Tensor) -> Tensor:
        """[...] of each rank -> [world size, ...] on every rank."""
        own = values.to(self.device)
        gathered = [torch.empty_like(own) for _ in range(self.world_size)]
        if self.world_size > 1:
            dist.all_gather(gathered, own)
        else:
            gathered = [own]
        heartbeat()
        return torch.stack(gathered)

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.world_size > 1:
            dist.barrier()
        heartbeat()

    def on_rank0(self, work: Callable[[Callable[[], object]], T]) -> T | None:
        """Rank 0 does ``work(heartbeat)``, the others wait; all must call.

        At each call of ``heartbeat`` every rank notes progress: the work may take longer than
        `training.hang_seconds`, and yet the run ends if rank 0 gets stuck in it.

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
        """``work()`` on every rank; if any refuses its input, all do, and none is left waiting in a
        collective.

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
            raise self.rank0_raises(MltfrError(message, remedy=""))
        raise error or MltfrError(f"Rank {first} on {message}", remedy="")

    def rank0_raises(self, error: MltfrError) -> MltfrError:
        """What a rank should raise where all ranks meet the same error: rank 0 the error, the
        others silence.
        """
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
        others = [f"rank {r} ({hosts[r]})" for r in differs.any(1).nonzero()[:, 0].tolist()]
        raise self.rank0_raises(
            ConfigError(
                f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} not the same on "
                f"{', '.join(others)} as on "
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


ALONE = Ranks(0, 1, torch.device("cpu"))
"""One process on the CPU, without a process group."""
