"""The stages of one model: stage 1, Fisher and consensus, stage 2, the choice by validation, the reading of the test split."""

from __future__ import annotations

import gc
import time
from itertools import islice
from pathlib import Path

import torch

from mltfr_dist.config import RunConfig
from mltfr_dist.distributed import checkpoint
from mltfr_dist.distributed.checkpoint import Progress
from mltfr_dist.distributed.engine import Engine, make_part, peak_memory_bytes
from mltfr_dist.distributed.fisher import batch_mean_squares, fisher_diagonals
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.files import write_atomically
from mltfr_dist.models.consensus import State, merge
from mltfr_dist.training.compare import test_metrics
from mltfr_dist.training.evaluate import ALL, evaluate
from mltfr_dist.training.explain import kept_token_texts
from mltfr_dist.training.inputs import (
    Inputs,
    build_model,
    consensus_tables,
    load_model,
    ranking_stream,
    train_stream,
)
from mltfr_dist.training.loop import Stage, is_finished, train_stage
from mltfr_dist.training.routing import measure_routing
from mltfr_dist.training.run_folder import CHECKPOINTS, RESULT, Result, load_result
from mltfr_dist.training.tracking import STAGES, Tracker

TRAIN, CONSENSUS = STAGES
CORE, FISHER = "core.safetensors", "fisher.safetensors"


def fit_model(config: RunConfig, inputs: Inputs, ranks: Ranks, *, read_test: bool) -> Result:
    """Train one model through its stages, choose by validation, read the test split once, if at all."""
    name = f"{config.backbone.name} + MLTFR" if config.mltfr.enabled else config.backbone.name
    finished = load_result(config.folder)
    if finished and (finished.test or not read_test):
        ranks.say(f"{name}: finished before, see {config.folder}")
        return finished
    ranks.say(f"{name}: up to {config.training.epochs} epochs")
    folder = config.folder / CHECKPOINTS
    outcomes = {TRAIN: run_stage(TRAIN, config, inputs, ranks)}
    if config.mltfr.enabled and config.mltfr.consensus.enabled:
        merged = consensus_core(config, inputs, ranks, outcomes[TRAIN])
        ranks.say(
            f"{name}, with the consensus expert: up to {config.training.consensus_epochs} epochs"
        )
        outcomes[CONSENSUS] = run_stage(CONSENSUS, config, inputs, ranks, outcomes[TRAIN], merged)
    stage, progress = max(
        outcomes.items(), key=lambda pair: (pair[1].best_value, pair[0] == CONSENSUS)
    )
    best = checkpoint.best_folder(folder, progress)
    before = outcomes[TRAIN].step if stage == CONSENSUS else 0
    step = before + ranks.jointly(lambda: checkpoint.read_header(best).progress.step)
    model = load_model(config, inputs, best, ranks, with_consensus=stage == CONSENSUS, step=step)
    valid = evaluate(model, ranking_stream(config, "valid", ranks), config.evaluation, ranks)
    test_slices = test_metrics(model, config, inputs.manifest, ranks) if read_test else {}
    test = test_slices.pop(ALL, {})
    routing = measure_routing(
        model, ranking_stream(config, "valid", ranks), ranks, inputs.table_names
    )
    memory = ranks.max(torch.tensor([float(peak_memory_bytes())], dtype=torch.float64))
    result = Result(
        name=name,
        valid=valid,
        test=test,
        test_slices=test_slices,
        routing=routing,
        seconds=sum(p.train_seconds for p in outcomes.values()),
        stage=stage,
        checkpoint=best.name,
        step=step,
        epoch=progress.best_epoch,
        epochs=sum(p.epoch for p in outcomes.values()),
        parameters=model.num_trained,
        peak_memory_bytes=int(memory.item()),
        world_size=ranks.world_size,
    )
    texts = kept_token_texts(config, inputs, model)  # on every rank: tables may be divided
    if ranks.is_main:
        final = list(outcomes.values())[-1]
        base = outcomes[TRAIN].step if len(outcomes) > 1 else 0
        tracker = Tracker(
            config.folder, active=True, stage=final.stage, step=final.step, base_step=base
        )
        if read_test:
            tracker.log("test", final.step, test)
        for tag, text in texts.items():
            tracker.text(tag, text, final.step)
        tracker.close()
        write_atomically(config.folder / RESULT, result.model_dump_json(indent=2) + "\n")
    ranks.barrier()
    return result


def run_stage(
    name: str,
    config: RunConfig,
    inputs: Inputs,
    ranks: Ranks,
    before: Progress | None = None,
    merged: State | None = None,
) -> Progress:
    """Train one stage from its last checkpoint, or from its start.

    Args:
        name: "train" or "consensus".
        config: The run.
        inputs: Its data and tables.
        ranks: All processes.
        before: Stage 1's outcome, for stage 2.
        merged: The consensus expert's parameters, for stage 2.
    """
    folder = config.folder / CHECKPOINTS
    epochs = config.training.epochs if name == TRAIN else config.training.consensus_epochs
    last = last_checkpoint(folder, name, ranks)
    progress = (
        ranks.jointly(lambda: checkpoint.read_header(last).progress)
        if last
        else Progress(stage=name)
    )
    done = last is not None and is_finished(config, progress, epochs)
    if last:
        over = ", where the stage is over" if done else ""
        ranks.say(
            f"  going on from {last.name} (epoch {progress.epoch}, step {progress.step}){over}"
        )
    if done:
        return progress
    part = make_part(config, ranks)
    stream = train_stream(config, part)
    model = build_model(config, inputs, ranks, with_consensus=name == CONSENSUS)
    if last:
        model.load_state_dict(ranks.jointly(lambda: checkpoint.read(last)))
    elif before is not None and merged is not None:
        start_from_stage_one(model, config, checkpoint.best_folder(folder, before), merged)
    engine = Engine(model.to(ranks.device), config, ranks, part, epochs * stream.steps_per_epoch)
    if last:
        checkpoint.restore_optimizer(last, engine)
    base = before.step if before else 0
    tracker = Tracker(
        config.folder,
        active=ranks.is_main,
        stage=name,
        step=progress.step if last else None,
        base_step=base,
    )
    valid = ranking_stream(config, config.evaluation.select_on, ranks)
    stage = Stage(
        name, epochs, config, folder, ranks, engine, stream, valid, tracker, inputs.table_names
    )
    progress = train_stage(stage, progress)
    tracker.close()
    engine.destroy()
    del stage, engine, model
    gc.collect()
    return progress


def last_checkpoint(folder: Path, stage: str, ranks: Ranks) -> Path | None:
    """The checkpoint that a stage goes on from, the same on every rank; None where there is none."""
    if ranks.is_main:
        checkpoint.remove_interrupted(folder, ranks.say)
    found = ranks.main_works(
        lambda goes_on: checkpoint.latest_intact(folder, stage, ranks.say, goes_on)
    )
    name = ranks.from_main(found.name if found else "")
    return folder / name if name else None


def start_from_stage_one(
    model: torch.nn.Module, config: RunConfig, best: Path, merged: State
) -> None:
    """Put stage 1's best weights (unless a fresh start is asked for) and the consensus expert into ``model``."""
    state = model.state_dict()
    if not config.mltfr.consensus.fresh_start:
        state |= checkpoint.read(best)
    model.load_state_dict(state | {f"mltfr.consensus.{name}": t for name, t in merged.items()})


def consensus_core(config: RunConfig, inputs: Inputs, ranks: Ranks, before: Progress) -> State:
    """The consensus expert from stage 1's best experts, made once and kept."""
    place = config.folder / CHECKPOINTS / "fisher"
    if not (place / checkpoint.HEADER).exists():
        started = time.monotonic()
        source = checkpoint.best_folder(place.parent, before)
        if config.mltfr.consensus.fisher_at == "last":
            source = checkpoint.step_folder(place.parent, before)
        step = ranks.jointly(lambda: checkpoint.read_header(source).progress.step)
        model = load_model(config, inputs, source, ranks, with_consensus=False, step=step)
        part = make_part(config, ranks)
        stream = train_stream(config, part)
        samples = min(config.mltfr.consensus.fisher_sequences, stream.split.num_sequences)
        steps = islice(stream.epoch(0), -(-samples // part.global_batch_size))
        if config.mltfr.consensus.fisher == "per_sample":
            fishers = fisher_diagonals(
                model, (batch for step in steps for batch in step.micro_batches), ranks, samples
            )
        else:
            fishers = batch_mean_squares(model, steps, ranks)
        assert model.mltfr is not None
        cores: list[State] = [core.state_dict() for core in model.mltfr.cores]
        if ranks.is_main:
            members = model.mltfr.experts_of(consensus_tables(config.mltfr, inputs.tables))
            merged = merge(
                [{name: t.cpu() for name, t in cores[e].items()} for e in members],
                [{name: t.cpu() for name, t in fishers[e].items()} for e in members],
                normalise=config.mltfr.consensus.normalise_fisher,
            )
            fisher_state = {
                f"{e}.{name}": t.cpu() for e, f in enumerate(fishers) for name, t in f.items()
            }
            checkpoint.write(place, {CORE: merged, FISHER: fisher_state}, before)
        ranks.barrier()
        ranks.say(
            f"  Fisher information of {len(cores)} experts over {samples} sequences: {time.monotonic() - started:.0f} s"
        )
    return checkpoint.read(place, CORE)
