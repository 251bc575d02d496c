"""Ranks with a fault that a test asks for; started by torchrun.

Usage: health_worker.py skipped FOLDER OUTPUT
       health_worker.py FAULT CONFIG STEP       train.py with a fault on rank 1 from STEP on
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from worker import no_dropout, resumed_from, steps

import train
from mltfr_dist.config import RunConfig
from mltfr_dist.data.stream import Part
from mltfr_dist.distributed import checkpoint
from mltfr_dist.distributed.checkpoint import Progress
from mltfr_dist.distributed.engine import Engine
from mltfr_dist.distributed.ranks import Ranks, leave, start_ranks, stop_ranks
from mltfr_dist.distributed.state import whole_parameters
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.training import loop, stages
from mltfr_dist.training.inputs import build_model, load_inputs

POISONED = "backbone.item_embedding.weight"
NAN_STEP, INF_STEP, STEPS = 2, 4, 8


def poisoned_engine(config: RunConfig, ranks: Ranks, micro: int, place: dict[str, int]) -> Engine:
    """An engine whose last rank has a NaN gradient at NAN_STEP, and an infinite loss with a finite gradient at INF_STEP."""
    model = build_model(config, load_inputs(config), with_consensus=False)
    last = ranks.rank == ranks.world_size - 1

    def poison_gradient(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * torch.nan if last and place["step"] == NAN_STEP else gradient

    def poison_loss(_module: object, _inputs: object, output: object) -> object:
        return output._replace(loss_sum=output.loss_sum + torch.inf) if last and place["step"] == INF_STEP else output

    dict(model.named_parameters())[POISONED].register_hook(poison_gradient)
    model.register_forward_hook(poison_loss)
    return Engine(model, config, ranks, Part(ranks.rank, ranks.world_size, 32, micro), STEPS)


def skipped(folder: Path, output: Path) -> None:
    """Per ZeRO stage: verdicts and losses of a run with two faults, and losses of one that lacks those two steps."""
    ranks = start_ranks(1)
    found = {}
    variants = {f"zero{stage}": (no_dropout(folder, stage), 32 // ranks.world_size) for stage in range(4)}
    variants["accumulated"] = (no_dropout(folder, 2), 8)
    variants["bf16"] = (no_dropout(folder, 2, training__precision="bf16"), 32 // ranks.world_size)
    for name, (config, micro) in variants.items():
        place = {"step": -1}
        engine = poisoned_engine(config, ranks, micro, place)
        verdicts, losses = [], []
        for step in range(STEPS):
            place["step"] = step
            before = whole_parameters(engine)
            loss = steps(engine, config, ranks, step, step + 1)
            if engine.verdict.nonfinite:
                verdicts.append([step, *engine.verdict.nonfinite])
                assert all(torch.equal(before[key], t) for key, t in whole_parameters(engine).items())
            else:
                losses += loss
        engine.destroy()
        place = {"step": -1}
        engine = poisoned_engine(config, ranks, micro, place)
        without = [steps(engine, config, ranks, s, s + 1)[0] for s in range(STEPS) if s not in (NAN_STEP, INF_STEP)]
        engine.destroy()
        found[name] = {"verdicts": verdicts, "losses": losses, "without": without}
    found |= skipped_first(folder, ranks)
    if ranks.is_main:
        output.write_text(json.dumps(found))
    stop_ranks()


def skipped_first(folder: Path, ranks: Ranks) -> dict[str, list[float]]:
    """Save after a first step that was skipped, and again after an update: Adam counts its updates, not the steps."""
    config, place = no_dropout(folder, 1), {"step": NAN_STEP}
    engine = poisoned_engine(config, ranks, 16, place)
    steps(engine, config, ranks, 0, 1)
    place["step"] = -1
    checkpoint.save(folder / "skipped-1", engine, Progress(stage="train", step=1, skipped_steps=1))
    first = steps(engine, config, ranks, 1, 3)
    checkpoint.save(folder / "skipped-3", engine, Progress(stage="train", step=3, skipped_steps=1))
    later = steps(engine, config, ranks, 3, 6)
    engine.destroy()
    return {
        "after 1": first + later,
        "after 1 resumed": resumed_from(config, ranks, folder / "skipped-1", 1, 6),
        "after 3": later,
        "after 3 resumed": resumed_from(config, ranks, folder / "skipped-3", 3, 6),
    }


def stuck_here() -> None:
    while True:
        time.sleep(1)


def train_with_fault(fault: str, config: str, from_step: int) -> int:
    """The real train.py, but rank 1 fails from a step on: `hang` (stops), `nan` (a gradient), `die` (SIGKILL)."""
    train_step, poison = loop.train_step, {"factor": 1.0}

    def faulty_step(stage: loop.Stage, batches: object, step: int) -> loop.StepTotals:
        if step >= from_step and stage.ranks.rank == 1:
            if fault == "hang":
                stuck_here()
            if fault == "die":
                os.kill(os.getpid(), 9)
            poison["factor"] = torch.nan
        return train_step(stage, batches, step)

    def faulty_model(*arguments: object, **named: object) -> Recommender:
        model = build_model(*arguments, **named)
        dict(model.named_parameters())[POISONED].register_hook(lambda gradient: gradient * poison["factor"])
        return model

    loop.train_step, stages.build_model = faulty_step, faulty_model
    return train.main(["--config", config])


if __name__ == "__main__":
    task, where, last = sys.argv[1:]
    if task == "skipped":
        skipped(Path(where), Path(last))
        leave()
    leave(train_with_fault(task, where, int(last)))
