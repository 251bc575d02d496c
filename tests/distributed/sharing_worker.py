"""One process of those that share memory.

Usage: sharing_worker.py FILE RANK WORLD_SIZE PLAN: FILE is the descriptor of the memory, PLAN one
of the functions below.
"""

from __future__ import annotations

import sys
import time

import torch
import torch.distributed as dist
from torch import Tensor

from mltfr_dist.distributed.shared_memory import SLOT_BYTES, SharedMemory
from mltfr_dist.models.kernels.build import library

SIZES = [
    (1,),
    (40, 7, 0, 3),
    (SLOT_BYTES // 4 - 1, 2),  # a tensor goes on in the next piece
    (SLOT_BYTES // 2, 5, SLOT_BYTES // 8),
]
"""Numbers of the tensors of each message."""


def numbers(rank: int, sizes: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """What a rank adds."""
    generator = torch.Generator().manual_seed(100 * rank + len(sizes))
    drawn = [torch.randn(n, generator=generator, dtype=torch.float64) for n in sizes]
    return [(1000 * t).to(dtype) if dtype == torch.int64 else t.to(dtype) for t in drawn]


def messages(shared: SharedMemory, rank: int, world_size: int) -> None:
    """Many messages of all kinds; prints a line that is the same on each rank if the bits are."""
    seen = []
    for sizes in SIZES:
        for dtype in (torch.float32, torch.float64, torch.int64):
            added = numbers(rank, sizes, dtype)
            largest = [t.clone() for t in added]
            shared.reduce(added)
            shared.reduce(largest, dist.ReduceOp.MAX)
            everyone = [numbers(r, sizes, dtype) for r in range(world_size)]
            for index in range(len(sizes)):
                of_all = torch.stack([given[index] for given in everyone])
                expected = of_all[0].clone()
                for row in of_all[1:]:
                    expected += row
                assert torch.equal(added[index], expected), (sizes, dtype)
                if sizes[index]:
                    assert torch.equal(largest[index], of_all.amax(0)), (sizes, dtype)
            seen += [t.double().sum().item() for t in added]
    halves = numbers(rank, (3,), torch.float32)
    shared.reduce(halves, scale=0.5)
    total = sum(numbers(r, (3,), torch.float32)[0] for r in range(world_size))
    assert torch.equal(halves[0], total * 0.5)
    lost = torch.tensor([torch.nan if rank == 1 else float(rank)])
    shared.reduce([lost], dist.ReduceOp.MAX)
    assert lost.isnan().all()
    for step in range(2000):  # nobody overtakes
        count = torch.tensor([step + rank])
        shared.reduce([count])
        assert count.item() == world_size * step + sum(range(world_size))
    print(seen, flush=True)


def until_lost(shared: SharedMemory, rank: int, world_size: int) -> None:
    """Adds without end, and says so; the last rank adds once and then sleeps."""
    started = time.monotonic()
    try:
        while True:
            started = time.monotonic()
            shared.reduce([torch.ones(3)])
            print("added", flush=True)
            if rank == world_size - 1:
                time.sleep(600)
    except dist.DistNetworkError as error:
        print(f"{error}; after {time.monotonic() - started:.1f} s", flush=True)


def differing(shared: SharedMemory, rank: int, world_size: int) -> None:
    """The last rank adds another number of numbers."""
    try:
        shared.reduce([torch.ones(3 + (rank == world_size - 1))])
    except dist.DistError as error:
        print(error, flush=True)
    time.sleep(3.0)  # nobody ends before all have seen it


if __name__ == "__main__":
    file, own, size, plan = sys.argv[1:]
    torch.set_num_threads(1)
    kernels = library()
    assert kernels is not None
    memory = SharedMemory(kernels, int(file), int(own), int(size))
    print("ready", flush=True)
    sys.stdin.readline()  # all are
    globals()[plan](memory, int(own), int(size))
