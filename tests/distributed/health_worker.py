"""Ranks with a fault that a test asks for; started by torchrun.

Usage: health_worker.py skipped FOLDER OUTPUT
       health_worker.py slow FOLDER OUTPUT      long passes that are healthy
       health_worker.py FAULT CONFIG STEP       train.py with a fault on rank 1 from STEP on
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from worker import no_dropout, resumed_from, steps

import train
from mltfr_dist.config import RunConfig
from mltfr_dist.data.batch import SequenceBatch
from mltfr_dist.data.stream.training import BatchLayout
from mltfr_dist.distributed import saving
from mltfr_dist.distributed.checkpoint import Progress
from mltfr_dist.distributed.engine import Engine
from mltfr_dist.distributed.fisher import fisher_diagonals
from mltfr_dist.distributed.meeting import leave, start_ranks, stop_ranks
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.distributed.state import whole_parameters
from mltfr_dist.distributed.watchdog import heartbeat, watched
from mltfr_dist.errors import ConfigError, MltfrError
from mltfr_dist.models.item_rows import ItemRows
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.training.build import build_model
from mltfr_dist.training.inputs import load_inputs
from mltfr_dist.training.running import loop, stages
from mltfr_dist.training.streams import train_stream

POISONED = "backbone.item_embedding.weight"
NAN_STEP, INF_STEP, STEPS = 2, 4, 8


def poisoned_engine(config: RunConfig, ranks: Ranks, micro: int, place: dict[str, int]) -> Engine:
    """An engine whose last rank has a NaN gradient at NAN_STEP, and an infinite loss with a finite
    gradient at INF_STEP.
    """
    model = build_model(config, load_inputs(config), with_consensus=False)
    last = ranks.rank == ranks.world_size - 1

    def poison_gradient(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * torch.nan if last and place["step"] == NAN_STEP else gradient

    def poison_loss(_module: object, _inputs: object, output: object) -> object:
        if not last or place["step"] != INF_STEP:
            return output
        loss = output.terms["loss"]
        poisoned = loss._replace(sum=loss.sum + torch.inf)
        return output._replace(terms=output.terms | {"loss": poisoned})

    def poison_lookup(_module: object, _inputs: object, output: torch.Tensor) -> None:
        output.register_hook(poison_gradient)

    embedding = model.backbone.item_embedding
    if isinstance(embedding, ItemRows):
        embedding.register_forward_hook(poison_lookup)
    else:
        embedding.weight.register_hook(poison_gradient)
    model.register_forward_hook(poison_loss)
    return Engine(model, config, ranks, BatchLayout(ranks.rank, ranks.world_size, 32, micro), STEPS)


def skipped(folder: Path, output: Path) -> None:
    """Per ZeRO stage: verdicts and losses of a run with two faults, and losses of one that lacks
    those two steps.
    """
    ranks = start_ranks(1)
    result = {}
    variants = {
        f"zero{stage}": (no_dropout(folder, stage), 32 // ranks.world_size) for stage in range(4)
    }
    variants["accumulated"] = (no_dropout(folder, 2), 8)
    variants["bf16"] = (no_dropout(folder, 2, training__precision="bf16"), 32 // ranks.world_size)
    sampled = {
        "loss__name": "sampled_softmax",
        "loss__num_negatives": 8,
        "optimizer__item_gradients": "sparse",
    }
    variants["rows"] = (no_dropout(folder, 1, **sampled), 8)
    variants["rows zero3"] = (no_dropout(folder, 3, **sampled), 32 // ranks.world_size)
    for name, (config, micro) in variants.items():
        place = {"step": -1}
        engine = poisoned_engine(config, ranks, micro, place)
        verdicts, losses = [], []
        for step in range(STEPS):
            place["step"] = step
            before = {key: t.clone() for key, t in whole_parameters(engine).items()}
            loss = steps(engine, config, ranks, step, step + 1)
            if engine.verdict.nonfinite:
                verdicts.append([step, *engine.verdict.nonfinite])
                assert all(
                    torch.equal(before[key], t) for key, t in whole_parameters(engine).items()
                )
            else:
                losses += loss
        engine.destroy()
        place = {"step": -1}
        engine = poisoned_engine(config, ranks, micro, place)
        without = [
            steps(engine, config, ranks, s, s + 1)[0]
            for s in range(STEPS)
            if s not in (NAN_STEP, INF_STEP)
        ]
        engine.destroy()
        result[name] = {"verdicts": verdicts, "losses": losses, "without": without}
    result |= skipped_first(folder, ranks)
    if ranks.is_main:
        output.write_text(json.dumps(result))
    stop_ranks()


def skipped_first(folder: Path, ranks: Ranks) -> dict[str, list[float]]:
    """Save after a first step that was skipped, and again after an update: Adam counts its updates,
    not the steps.
    """
    config, place = no_dropout(folder, 1), {"step": NAN_STEP}
    engine = poisoned_engine(config, ranks, 16, place)
    steps(engine, config, ranks, 0, 1)
    place["step"] = -1
    saving.save(folder / "skipped-1", engine, Progress(stage="train", step=1, skipped_steps=1))
    first = steps(engine, config, ranks, 1, 3)
    saving.save(folder / "skipped-3", engine, Progress(stage="train", step=3, skipped_steps=1))
    later = steps(engine, config, ranks, 3, 6)
    engine.destroy()
    return {
        "after 1": first + later,
        "after 1 resumed": resumed_from(config, ranks, folder / "skipped-1", 1, 6),
        "after 3": later,
        "after 3 resumed": resumed_from(config, ranks, folder / "skipped-3", 3, 6),
    }


PATIENCE_SECONDS, PART_SECONDS, PARTS = 6.0, 2.5, 4
"""Each part of a pass ends in time, the whole pass does not."""


def slow(folder: Path, output: Path) -> None:
    """Rank 0 works for long while the others wait; then every rank does, in a Fisher pass."""
    ranks = start_ranks(1)
    config = no_dropout(folder, 1)
    model = build_model(config, load_inputs(config), with_consensus=False)
    (batch,) = next(
        train_stream(
            config, BatchLayout(ranks.rank, ranks.world_size, 32, 32 // ranks.world_size)
        ).epoch(0)
    ).micro_batches
    said = []

    def work(heartbeat: Callable[[], object]) -> str:
        for _ in range(PARTS):
            time.sleep(PART_SECONDS)
            heartbeat()
        return "done"

    def batches() -> Iterator[SequenceBatch]:
        for _ in range(PARTS):
            time.sleep(PART_SECONDS)
            yield batch

    def refuse(heartbeat: Callable[[], object]) -> None:
        raise ConfigError("refused", remedy="")

    with watched(ranks.rank, PATIENCE_SECONDS):
        heartbeat("a slow pass")
        said.append(ranks.on_rank0(work) or "waited")
        fisher_diagonals(model, batches(), ranks, 32)
        try:
            ranks.on_rank0(refuse)
        except MltfrError as error:
            said.append(type(error).__name__)
    (output.parent / f"slow-{ranks.rank}.json").write_text(json.dumps(said))
    stop_ranks()


def stuck_here() -> None:
    while True:
        time.sleep(1)


def train_with_fault(fault: str, config: str, from_step: int) -> int:
    """The real train.py, but rank 1 fails from a step on: `hang` (stops), `nan` (a gradient), `die`
    (SIGKILL).
    """
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
        dict(model.named_parameters())[POISONED].register_hook(
            lambda gradient: gradient * poison["factor"]
        )
        return model

    loop.train_step, stages.build_model = faulty_step, faulty_model
    return train.main(["--config", config])


if __name__ == "__main__":
    task, where, last = sys.argv[1:]
    if task in ("skipped", "slow"):
        {"skipped": skipped, "slow": slow}[task](Path(where), Path(last))
        leave()
    leave(train_with_fault(task, where, int(last)))
