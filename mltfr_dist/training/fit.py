"""A run: baselines, stage 1, Fisher and consensus, stage 2, and the one reading of the test split."""

from __future__ import annotations

import gc
import time
from contextlib import suppress
from itertools import islice
from pathlib import Path

import torch

from mltfr_dist.config import RunConfig
from mltfr_dist.data.manifest import verify_folder
from mltfr_dist.distributed import checkpoint
from mltfr_dist.distributed.checkpoint import Progress
from mltfr_dist.distributed.engine import Engine, deepspeed_config, make_part, peak_memory_bytes, versions
from mltfr_dist.distributed.fisher import batch_mean_squares, fisher_diagonals
from mltfr_dist.distributed.placement import check_placement
from mltfr_dist.distributed.ranks import Ranks, lost_ranks_told, start_ranks
from mltfr_dist.distributed.signals import stop_signals
from mltfr_dist.distributed.watchdog import watched
from mltfr_dist.errors import DamagedError
from mltfr_dist.files import file_sha256, write_atomically
from mltfr_dist.models.consensus import State, merge
from mltfr_dist.training import baselines, report
from mltfr_dist.training.evaluate import ALL, Scorer, evaluate, evaluate_slices
from mltfr_dist.training.explain import kept_token_texts
from mltfr_dist.training.inputs import (
    Inputs,
    build_model,
    check_division,
    consensus_tables,
    leave_out_bad_shards,
    load_inputs,
    load_model,
    ranking_stream,
    record_inputs,
    train_stream,
)
from mltfr_dist.training.loop import Stage, is_finished, train_stage
from mltfr_dist.training.routing import measure_routing
from mltfr_dist.training.run_folder import CHECKPOINTS, RESULT, Result, claim, leaf_values, load_result
from mltfr_dist.training.slices import training_slices
from mltfr_dist.training.tracking import STAGES, Tracker

TRAIN, CONSENSUS = STAGES
CORE, FISHER = "core.safetensors", "fisher.safetensors"


def fit(config: RunConfig, *, resume: bool = True) -> list[Result]:
    """Train and compare as ``config`` says; all ranks must call.

    Everything that can be checked is checked first, on all ranks, before anything is written. A run that was
    interrupted goes on from its last checkpoint; one that is finished is only reported.

    Returns:
        Outcomes in the report's order, the configured model last.

    Raises:
        MltfrError: Bad input, or the run was asked to stop, or lost a rank.
    """
    ranks = start_ranks(config.training.threads, config.training.hang_seconds)
    with watched(ranks.rank, config.training.hang_seconds), stop_signals(), lost_ranks_told():
        config = leave_out_bad_shards(config, ranks)
        inputs = check_all(config, ranks, resume=resume)
        return run(config, inputs, ranks)


def check_all(config: RunConfig, ranks: Ranks, *, resume: bool) -> Inputs:
    """Check what can be checked before any work, the ranks against each other too, and make the run's folder.

    Raises:
        MltfrError: Bad input; nothing was written.
    """
    same_everywhere(config, ranks)

    def check() -> Inputs:
        inputs = load_inputs(config, verify=ranks.is_first_of_node)
        part = make_part(config, ranks)
        zero_stage = deepspeed_config(config, part).get("zero_optimization", {}).get("stage", 0)
        check_division(config.mltfr, part, zero_stage)
        check_placement(config.mltfr, inputs.tables, ranks, zero_stage)
        train_stream(config, part)
        if ranks.is_main:
            verify_folder(config.data.path, left_out=config.data.left_out)
        return inputs

    def take() -> None:
        if ranks.is_main:
            claim(config.folder, config, resume=resume)
            record_inputs(config.folder, inputs)
            check_checkpoints(config.folder)

    inputs = ranks.jointly(check)
    files = {f"`{name}`": digest for name, digest in inputs.hashes.items()} | {
        f"{config.deepspeed}": file_sha256(config.deepspeed)
    }
    ranks.agree(files, rule="Every node reads the same data, token tables and DeepSpeed file.", remedy="Copy them anew there.")
    ranks.jointly(take)
    return inputs


def same_everywhere(config: RunConfig, ranks: Ranks) -> None:
    """Compare code and configuration between ranks.

    Raises:
        ConfigError: They differ.
    """
    rule = "All ranks of a run execute one program with one configuration."
    ranks.agree(versions(), rule=rule, remedy="Install the same release on every node, or share one environment.")
    leaves = {f"`{path}`": str(value) for path, value in leaf_values(config).items()}
    ranks.agree(leaves, rule=rule, remedy="Start every rank with the same preset, file and overrides.")


def run(config: RunConfig, inputs: Inputs, ranks: Ranks) -> list[Result]:
    """Train and compare; the outcomes in the report's order."""
    ranks.say(report.opening(config, inputs, ranks))
    results = [compare(name, config, inputs, ranks) for name in config.baselines]
    results.append(fit_model(config, inputs, ranks))
    if ranks.is_main:
        report.write(config, inputs, results)
        print(report.closing(config, results), flush=True)
    ranks.barrier()
    return results


def check_checkpoints(folder: Path) -> None:
    """Refuse a run whose checkpoints another release wrote, before any work.

    Raises:
        CheckpointError: A header is of another schema version.
    """
    for header in (folder / CHECKPOINTS).glob(f"*/{checkpoint.HEADER}"):
        with suppress(DamagedError):  # skipped when its turn comes
            checkpoint.read_header(header.parent)


def compare(name: str, config: RunConfig, inputs: Inputs, ranks: Ranks) -> Result:
    """A baseline's outcome."""
    if name == "backbone":
        bare = bare_config(config)
        if ranks.is_main:
            claim(bare.folder, bare, resume=True)
            record_inputs(bare.folder, Inputs(inputs.manifest, (), inputs.hashes))
        ranks.barrier()
        return fit_model(bare, Inputs(inputs.manifest, (), inputs.hashes), ranks)
    started = time.monotonic()
    train = baselines.training_sequences(config.data.path, inputs.manifest)
    scorer: Scorer = getattr(baselines, name)(train, inputs.manifest.num_items)
    seconds = time.monotonic() - started
    valid, test = (
        evaluate(scorer, ranking_stream(config, split, ranks), config.evaluation, ranks) for split in ("valid", "test")
    )
    return Result(name=name, valid=valid, test=test, seconds=seconds, world_size=ranks.world_size)


def bare_config(config: RunConfig) -> RunConfig:
    """The same run without MLTFR, with the epochs of both stages, in a folder inside the run's."""
    training = config.training
    if config.mltfr.consensus.enabled:
        training = training.model_copy(update={"epochs": training.epochs + training.consensus_epochs})
    mltfr = config.mltfr.model_copy(update={"enabled": False})
    return config.model_copy(
        update={"name": "backbone", "runs_dir": config.folder, "mltfr": mltfr, "training": training, "baselines": ()}
    )


def fit_model(config: RunConfig, inputs: Inputs, ranks: Ranks) -> Result:
    """Train one model through its stages, choose by validation, read the test split once."""
    name = f"{config.backbone.name} + MLTFR" if config.mltfr.enabled else config.backbone.name
    finished = load_result(config.folder)
    if finished:
        ranks.say(f"{name}: finished before, see {config.folder}")
        return finished
    ranks.say(f"{name}: up to {config.training.epochs} epochs")
    folder = config.folder / CHECKPOINTS
    outcomes = {TRAIN: run_stage(TRAIN, config, inputs, ranks)}
    if config.mltfr.enabled and config.mltfr.consensus.enabled:
        merged = consensus_core(config, inputs, ranks, outcomes[TRAIN])
        ranks.say(f"{name}, with the consensus expert: up to {config.training.consensus_epochs} epochs")
        outcomes[CONSENSUS] = run_stage(CONSENSUS, config, inputs, ranks, outcomes[TRAIN], merged)
    stage, progress = max(outcomes.items(), key=lambda pair: (pair[1].best_value, pair[0] == CONSENSUS))
    best = checkpoint.best_folder(folder, progress)
    model = load_model(config, inputs, best, ranks, with_consensus=stage == CONSENSUS)
    valid = evaluate(model, ranking_stream(config, "valid", ranks), config.evaluation, ranks)
    slices = training_slices(config, inputs.manifest)
    test_stream = ranking_stream(config, "test", ranks)
    test_slices = evaluate_slices(model, test_stream, config.evaluation, ranks, slices.NAMES, slices.members)
    test = test_slices.pop(ALL)
    routing = measure_routing(model, ranking_stream(config, "valid", ranks), ranks, inputs.table_names)
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
        tracker = Tracker(config.folder, active=True, stage=final.stage, step=final.step, base_step=base)
        tracker.log("test", final.step, test)
        for tag, text in texts.items():
            tracker.text(tag, text, final.step)
        tracker.close()
        write_atomically(config.folder / RESULT, result.model_dump_json(indent=2) + "\n")
    ranks.barrier()
    return result


def run_stage(
    name: str, config: RunConfig, inputs: Inputs, ranks: Ranks, before: Progress | None = None, merged: State | None = None
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
    progress = ranks.jointly(lambda: checkpoint.read_header(last).progress) if last else Progress(stage=name)
    if last and is_finished(config, progress, epochs):
        return progress
    if last:
        ranks.say(f"  going on from {last.name} (epoch {progress.epoch}, step {progress.step})")
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
    tracker = Tracker(config.folder, active=ranks.is_main, stage=name, step=progress.step if last else None, base_step=base)
    valid = ranking_stream(config, config.evaluation.select_on, ranks)
    stage = Stage(name, epochs, config, folder, ranks, engine, stream, valid, tracker, inputs.table_names)
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
    found = ranks.main_works(lambda goes_on: checkpoint.latest_intact(folder, stage, ranks.say, goes_on))
    name = ranks.from_main(found.name if found else "")
    return folder / name if name else None


def start_from_stage_one(model: torch.nn.Module, config: RunConfig, best: Path, merged: State) -> None:
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
        best = checkpoint.best_folder(place.parent, before)
        model = load_model(config, inputs, best, ranks, with_consensus=False)
        part = make_part(config, ranks)
        stream = train_stream(config, part)
        samples = min(config.mltfr.consensus.fisher_sequences, stream.split.num_sequences)
        steps = islice(stream.epoch(0), -(-samples // part.global_batch_size))
        if config.mltfr.consensus.fisher == "per_sample":
            fishers = fisher_diagonals(model, (batch for step in steps for batch in step.micro_batches), ranks, samples)
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
            fisher_state = {f"{e}.{name}": t.cpu() for e, f in enumerate(fishers) for name, t in f.items()}
            checkpoint.write(place, {CORE: merged, FISHER: fisher_state}, before)
        ranks.barrier()
        ranks.say(f"  Fisher information of {len(cores)} experts over {samples} sequences: {time.monotonic() - started:.0f} s")
    return checkpoint.read(place, CORE)
