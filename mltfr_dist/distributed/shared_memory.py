"""Sums of the ranks of one machine through memory that they share.

gloo takes one to several milliseconds for forty bytes where every core computes: its threads have
to be woken on each side. Ranks that all stand on one machine need neither threads nor a network
(`models/kernels/together.cpp`).
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress

import torch
import torch.distributed as dist
from torch import Tensor

from mltfr_dist.models.kernels.build import pointers

SLOT_BYTES = 1 << 20
"""A rank's share of the memory; longer messages go in pieces."""
TYPES = {torch.float32: 0, torch.float64: 1, torch.int64: 2}
OPERATIONS = {dist.ReduceOp.SUM: False, dist.ReduceOp.MAX: True}
DONE, OUT_OF_STEP = -1, -2


class SharedMemory:
    """Memory of all ranks of a machine, in which they add numbers up.

    All ranks must have made theirs before one adds, for a rank that has none yet looks as if its
    process had ended; and all must call :meth:`reduce` at the same point.
    """

    def __init__(self, kernels: ctypes.CDLL, file: int, rank: int, world_size: int) -> None:
        """Args: kernels: the library; file: descriptor of a file in memory that all ranks have
        opened and nobody has written to, which this object closes.
        """
        self._rank, self._world_size, self._file = rank, world_size, file
        self._reduce = kernels.reduce_together
        self._reduce.restype = kernels.bytes_told.restype = ctypes.c_int64
        told = kernels.bytes_told(ctypes.c_int64(world_size))
        size = told + (world_size + 1) * SLOT_BYTES
        os.posix_fallocate(file, 0, size)  # no room is an error now, and no signal later
        self._memory = mmap.mmap(file, size)
        self._start = ctypes.c_char.from_buffer(self._memory)
        self._arrivals = ctypes.c_int64(0)
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)  # says that this process lives

    def takes(self, tensors: Sequence[Tensor], operation: dist.ReduceOp.RedOpType) -> bool:
        """Whether :meth:`reduce` can do this, the same on all ranks."""
        first = tensors[0].dtype
        return operation in OPERATIONS and first in TYPES and all(t.dtype == first for t in tensors)

    def reduce(
        self,
        tensors: Sequence[Tensor],
        operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
        *,
        scale: float = 1.0,
    ) -> None:
        """Every number becomes the sum over all ranks times ``scale``, or the largest of all, in
        place; to the bit the same on each.

        Args:
            tensors: contiguous, on the CPU, of one type; of the same sizes on every rank.
            operation: which of the two.
            scale: for sums.

        Raises:
            DistNetworkError: The process of another rank has ended.
            DistError: The ranks do not add the same.
        """
        counts = (ctypes.c_int64 * len(tensors))(*(t.numel() for t in tensors))
        found = self._reduce(
            pointers(tensors),
            counts,
            *map(ctypes.c_int64, (len(tensors), TYPES[tensors[0].dtype], OPERATIONS[operation])),
            ctypes.c_double(scale),
            ctypes.byref(self._start),
            *map(ctypes.c_int64, (SLOT_BYTES, self._rank, self._world_size, self._file)),
            ctypes.byref(self._arrivals),
        )
        if found == OUT_OF_STEP:
            raise dist.DistError("the ranks of this machine have come with messages that differ")
        if found != DONE:
            raise dist.DistNetworkError(f"the process of rank {found} on this machine has ended")

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):
            os.close(self._file)
