"""Two ranks that make the same steps with and without shared memory, or cannot share any.

torchrun starts it.

Usage: shared_step_worker.py FOLDER | refused
"""

from __future__ import annotations

import errno
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from worker import make_engine, no_dropout, steps

from mltfr_dist.distributed.meeting import leave, start_ranks, stop_ranks
from mltfr_dist.distributed.ranks import Ranks


def trained(folder: Path, ranks: Ranks, micro_batch_size: int | None) -> list[torch.Tensor]:
    """Losses and parameters after some steps at stage 0."""
    config = no_dropout(folder, 0)
    engine = make_engine(config, ranks, micro_batch_size)
    losses = torch.tensor(steps(engine, config, ranks, 0, 6), dtype=torch.float64)
    return [losses, *(p.detach().clone() for p in engine.module.parameters())]


def refused(*_: object) -> int:
    raise OSError(errno.ENOSYS, "not here")


def without_memory() -> None:
    os.memfd_create = refused  # type: ignore[assignment]
    ranks = start_ranks(1)
    assert ranks.shared is None
    assert ranks.sum(torch.ones(2)).tolist() == [2, 2]


def compare(folder: Path) -> None:
    ranks = start_ranks(1)
    assert ranks.shared is not None
    by_gloo = replace(ranks, shared=None)
    for micro_batch_size in (None, 8):
        pairs = zip(
            trained(folder, ranks, micro_batch_size),
            trained(folder, by_gloo, micro_batch_size),
            strict=True,
        )
        if all(torch.equal(a, b) for a, b in pairs) and ranks.is_main:
            print("equal to the bit", flush=True)
    ranks.barrier()


if __name__ == "__main__":
    if sys.argv[1] == "refused":
        without_memory()
    else:
        compare(Path(sys.argv[1]))
    stop_ranks()
    leave()
