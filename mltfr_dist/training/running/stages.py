"""The stages of one model: stage 1, Fisher and consensus, stage 2, the choice by validation, the
reading of the test split.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path

import torch

from mltfr_dist.config import RunConfig
from mltfr_dist.data.stream.training import StepBatches
from mltfr_dist.distributed import checkpoint, kept, saving
from mltfr_dist.distributed.checkpoint import Progress
from mltfr_dist.distributed.engine import Engine, batch_layout
from mltfr_dist.distributed.fisher import fisher_diagonals
from mltfr_dist.distributed.health import UntilStopped
from mltfr_dist.distributed.kept import Choice
from mltfr_dist.distributed.lock import check_held
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.distributed.resources import peak_memory_bytes
from mltfr_dist.distributed.sending import send_text
from mltfr_dist.distributed.watchdog import heartbeat
from mltfr_dist.errors import DamagedError
from mltfr_dist.files import write_atomically
from mltfr_dist.models.consensus import State
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.models.selectors import Reduce
from mltfr_dist.published.procedure import Procedure, published_procedure
from mltfr_dist.training.build import build_model, load_model
from mltfr_dist.training.checks import consensus_tables
from mltfr_dist.training.evaluating.compare import final_metrics, ranked
from mltfr_dist.training.evaluating.evaluate import ALL
from mltfr_dist.training.evaluating.rankers import ByModel
from mltfr_dist.training.evaluating.routing import measure_routing
from mltfr_dist.training.inputs import Inputs
from mltfr_dist.training.reporting.outcome import show_outcome
from mltfr_dist.training.reporting.projector import projected
from mltfr_dist.training.reporting.tracking import Tracker, write_test_line
from mltfr_dist.training.run_folder import CHECKPOINTS, RANKS, RESULT, STAGES, Result, load_result
from mltfr_dist.training.running.loop import Stage, is_finished, train_stage
from mltfr_dist.training.running.speed import Speed
from mltfr_dist.training.streams import train_stream
from mltfr_dist.training.using.explain import TokenSample

TRAIN, CONSENSUS = STAGES
FISHER_FOLDER, CORE, FISHER = "fisher", "core.safetensors", "fisher.safetensors"


def fit_model(config: RunConfig, inputs: Inputs, ranks: Ranks, *, read_test: bool) -> Result:
    """Train one model through its stages, choose by validation, read test once, if at all."""
    name = f"{config.backbone.name} + MLTFR" if config.mltfr.enabled else config.backbone.name
    finished = result_for_all(config.folder, ranks)
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
    best = best_for_all(folder, outcomes, ranks)
    second = best.stage == CONSENSUS
    step = steps_behind(folder / best.name, ranks) + second * outcomes[TRAIN].step
    model = load_model(config, inputs, folder / best.name, ranks, with_consensus=second)
    path, manifest = config.folder / RANKS, inputs.manifest
    valid, test_slices = final_metrics(ByModel(model), config, manifest, ranks, read_test, path)
    test = test_slices.pop(ALL, {})
    users = ranked(config, "valid", ranks, once_a_user=True)
    routing = measure_routing(model, users, ranks, inputs.table_names)
    memory = ranks.max(torch.tensor([float(peak_memory_bytes())], dtype=torch.float64))
    result = Result(
        name=name,
        valid=valid,
        test=test,
        test_slices=test_slices,
        routing=routing,
        seconds=sum(p.train_seconds for p in outcomes.values()),
        stage=best.stage,
        checkpoint=best.name,
        step=step,
        epoch=best.epoch,
        epochs=sum(p.epoch for p in outcomes.values()),
        parameters=model.num_trained,
        peak_memory_bytes=int(memory.item()),
        world_size=ranks.world_size,
    )
    vectors, final = projected(config, model) if read_test else None, list(outcomes.values())[-1]
    ranks.on_rank0(lambda _: check_held())
    if ranks.is_main:
        if read_test:
            write_test_line(config.folder, final.stage, final.step, test)
            show_outcome(config, vectors, result, final.stage)
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
    progress = saving.progress_for_all(last, ranks) if last else Progress(stage=name)
    if last and is_over(last, progress, config, epochs, ranks):
        return progress
    layout = batch_layout(config, ranks)
    stream = train_stream(config, layout)
    model = build_model(config, inputs, ranks, with_consensus=name == CONSENSUS)
    if last:
        model.load_state_dict(saving.read_weights(model, last, ranks))
    elif before is not None and merged is not None:
        start_from_stage_one(model, config, before, merged, ranks)
    engine = Engine(model.to(ranks.device), config, ranks, layout, epochs * stream.steps_per_epoch)
    if last:
        saving.restore_optimizer(last, engine)
    base, behind = (before.step, before.epoch) if before else (0, 0)
    tracker = Tracker(
        config.folder,
        active=ranks.is_main,
        stage=name,
        step=progress.step if last else None,
        base_step=base,
    )
    valid = ranked(config, config.picks_on, ranks)
    speed = Speed(engine, active=ranks.is_main)
    sample = TokenSample.load(config, inputs, ranks)
    tracker.open_with(config)
    whose, names = (config, folder, ranks), inputs.table_names
    stage = Stage(
        name, behind, epochs, *whose, engine, stream, valid, tracker, names, speed, sample
    )
    with closing(tracker):  # also of a stage that is stopped: its process may go on to another run
        progress = train_stage(stage, progress)
    engine.destroy()
    del stage, engine, model
    gc.collect()
    return progress


def is_over(last: Path, progress: Progress, config: RunConfig, epochs: int, ranks: Ranks) -> bool:
    """Say where the stage goes on from; whether it is over there."""
    done = is_finished(config, progress, epochs)
    over = ", where the stage is over" if done else ""
    ranks.say(f"  going on from {last.name} (epoch {progress.epoch}, step {progress.step}){over}")
    return done


def result_for_all(folder: Path, ranks: Ranks) -> Result | None:
    """A finished run's outcome as rank 0 reads it, None while unfinished. All ranks must call.

    Raises:
        CheckpointError: The file is damaged.
    """
    result = ranks.on_rank0(lambda _: load_result(folder))
    text = send_text(result.model_dump_json() if result else None, ranks)
    return Result.model_validate_json(text) if text else None


def last_checkpoint(folder: Path, stage: str, ranks: Ranks) -> Path | None:
    """The checkpoint that a stage goes on from, the same on every rank; None for none."""

    def find(heartbeat: Callable[[], object]) -> Path | None:
        kept.remove_interrupted(folder, ranks.say)
        intact = kept.latest_intact(folder, stage, ranks.say, heartbeat)
        if intact is None and kept.latest(folder, stage) is not None:
            ranks.say(f"  warning: no checkpoint of stage `{stage}` is whole: it begins anew")
        return intact

    intact = ranks.on_rank0(find)
    name = ranks.from_main(intact.name if intact else "")
    return folder / name if name else None


def best_for_all(folder: Path, outcomes: Mapping[str, Progress], ranks: Ranks) -> Choice:
    """The stages' best weights, or the best that are left, on every rank. All ranks must call."""
    best = ranks.on_rank0(
        lambda heartbeat: kept.best_intact(folder, outcomes, ranks.say, heartbeat)
    )
    return Choice(*json.loads(ranks.from_main(json.dumps(best))))


def steps_behind(folder: Path, ranks: Ranks) -> int:
    """Updates of its stage behind a checkpoint; rank 0 reads it, and all ranks must call."""
    step = ranks.on_rank0(lambda _: checkpoint.read_header(folder).progress.step)
    return int(ranks.from_main(str(step)))


def start_from_stage_one(
    model: torch.nn.Module, config: RunConfig, before: Progress, merged: State, ranks: Ranks
) -> None:
    """Put stage 1's best weights and the consensus expert into ``model``."""
    state = model.state_dict()
    updates = {  # of the run, which has gone on since its best weights
        name: torch.full_like(t, before.step)
        for name, t in state.items()
        if name.endswith(".updates")
    }

    def best() -> State:
        folder = config.folder / CHECKPOINTS
        name = best_for_all(folder, {TRAIN: before}, ranks).name
        return saving.read_weights(model, folder / name, ranks)

    state = between_stages(config, ranks).second_start(state, best)
    consensus = {f"mltfr.consensus.{name}": t for name, t in merged.items()}
    model.load_state_dict(state | updates | consensus)


def consensus_core(config: RunConfig, inputs: Inputs, ranks: Ranks, before: Progress) -> State:
    """The consensus expert from stage 1's best experts, made once and kept."""
    path = config.folder / CHECKPOINTS / FISHER_FOLDER
    if ranks.from_main("whole" if ranks.on_rank0(lambda _: is_made(path, ranks)) else ""):
        return saving.read_for_all(path, ranks, CORE)
    started = time.monotonic()
    procedure = between_stages(config, ranks)
    source = procedure.merged_from(
        lambda: path.parent / best_for_all(path.parent, {TRAIN: before}, ranks).name,
        checkpoint.step_folder(path.parent, before),
    )
    model = load_model(config, inputs, source, ranks, with_consensus=False)
    layout = batch_layout(config, ranks)
    stream = train_stream(config, layout)
    samples = min(config.mltfr.consensus.fisher_sequences, stream.split.num_sequences)
    steps = islice(
        UntilStopped(stream.epoch(0), ranks, "the Fisher pass"),
        -(-samples // layout.global_batch_size),
    )
    fishers = procedure.fisher(model, steps, ranks, samples)
    assert model.mltfr is not None
    cores: list[State] = [core.state_dict() for core in model.mltfr.cores]
    members = model.mltfr.experts_of(consensus_tables(config, inputs.tables))

    def make(heartbeat: Callable[[], object]) -> None:
        merged = procedure.merge(
            [{name: t.cpu() for name, t in cores[e].items()} for e in members],
            [{name: t.cpu() for name, t in fishers[e].items()} for e in members],
        )
        fisher_state = {
            f"{e}.{name}": t.cpu() for e, f in enumerate(fishers) for name, t in f.items()
        }
        checkpoint.write(path, {CORE: merged, FISHER: fisher_state}, before, heartbeat)

    ranks.on_rank0(make)
    ranks.say(
        f"  Fisher information of {len(cores)} experts over {samples} sequences: "
        f"{time.monotonic() - started:.0f} s"
    )
    return saving.read_for_all(path, ranks, CORE)


def between_stages(config: RunConfig, ranks: Ranks) -> Procedure:
    """What is done between the stages; its calls are for all ranks."""

    def per_sample(
        model: Recommender, steps: Iterable[StepBatches], reduce: Reduce, num_samples: int
    ) -> list[State]:
        batches = (batch for step in steps for batch in step.micro_batches)
        return fisher_diagonals(model, batches, ranks, num_samples)

    return published_procedure(config.published, Procedure(per_sample), heartbeat)


def is_made(path: Path, ranks: Ranks) -> bool:
    """Whether the consensus expert is there and whole; one that is damaged is told."""
    if not (path / checkpoint.HEADER).exists():
        return False
    try:
        checkpoint.verify(path, CORE)
    except DamagedError as error:
        ranks.say(f"  warning: the consensus expert is made again: {error.what}")
        return False
    return True
