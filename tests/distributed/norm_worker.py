"""Stages 1 and 2 with the norm left on the device and without; started by torchrun.

Usage: norm_worker.py compared FOLDER OUTPUT
       norm_worker.py unlike FOLDER OUTPUT      GPUs of two kinds
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from health_worker import INF_STEP, NAN_STEP, STEPS, poisoned_engine
from torch.utils._python_dispatch import TorchDispatchMode
from worker import make_engine, no_dropout, steps

from mltfr_dist.config import RunConfig
from mltfr_dist.distributed import engine as engines
from mltfr_dist.distributed.engine import Engine
from mltfr_dist.distributed.meeting import start_ranks, stop_ranks
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.errors import MltfrError

HUGE_STEP = 6
assert HUGE_STEP not in (NAN_STEP, INF_STEP)


class Asked(TorchDispatchMode):
    """Counts the numbers that a GPU would be asked for, or sent."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def trained(
    config: RunConfig, ranks: Ranks, micro: int, *, on_device: bool
) -> dict[str, list[Any]]:
    """Losses, norms, verdicts, and how often DeepSpeed's step asks, of a run with three faults."""
    engines.may_be_asked = lambda _: not on_device
    place = {"step": -1}
    engine = poisoned_engine(config, ranks, micro, place)
    assert (engine.norm_on_device is not None) == on_device
    weight = engine.module.backbone.item_embedding.weight
    weight.register_hook(lambda gradient: gradient * (1e25 if place["step"] == HUGE_STEP else 1.0))
    asked = counted(engine)
    result: dict[str, list[Any]] = {"losses": [], "norms": [], "verdicts": []}
    for step in range(STEPS):
        place["step"] = step
        result["losses"] += steps(engine, config, ranks, step, step + 1)
        if engine.verdict.nonfinite:
            result["verdicts"].append([step, *engine.verdict.nonfinite])
        else:
            result["norms"].append(engine.grad_norm())
    engine.destroy()
    return result | {"asked": [asked["step"]]}


def counted(engine: Engine) -> Counter[str]:
    """Watches DeepSpeed's steps."""
    plain, asked = engine.deepspeed.step, Counter[str]()

    def step() -> None:
        with Asked() as mode:
            plain()
        asked["step"] += mode.count

    engine.deepspeed.step = step
    return asked


def compared(folder: Path, output: Path) -> None:
    """Each variant by DeepSpeed's way and by ours."""
    ranks = start_ranks(1)
    whole = 32 // ranks.world_size
    variants = {
        "zero1": (no_dropout(folder, 1), whole),
        "zero2": (no_dropout(folder, 2), whole),
        "accumulated": (no_dropout(folder, 2), 8),
        "unclipped": (no_dropout(folder, 1, optimizer__max_grad_norm=None), whole),
        "bf16": (no_dropout(folder, 1, training__precision="bf16"), whole),
    }
    result = {
        name: [trained(config, ranks, micro, on_device=on_device) for on_device in (False, True)]
        for name, (config, micro) in variants.items()
    }
    if ranks.is_main:
        output.write_text(json.dumps(result))
    stop_ranks()


def unlike(folder: Path, output: Path) -> None:
    """What ranks say of each stage where only the first one's GPU is fast in float64."""
    ranks = start_ranks(1)
    engines.is_fast_in_float64 = lambda _: ranks.is_main
    said = {}
    for stage in (2, 3):
        try:
            make_engine(no_dropout(folder, stage), ranks).destroy()
            said[str(stage)] = ""
        except MltfrError as error:
            said[str(stage)] = str(error)
    if ranks.is_main:
        output.write_text(json.dumps(said))
    stop_ranks()


if __name__ == "__main__":
    _, task, data, found = sys.argv
    {"compared": compared, "unlike": unlike}[task](Path(data), Path(found))
