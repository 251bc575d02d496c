"""Training: a step, an epoch, a stage. `fit.py` puts stages together to a run."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mltfr_dist.config import RunConfig
from mltfr_dist.data.batch import RankingBatch
from mltfr_dist.data.stream import StepBatches, TrainStream
from mltfr_dist.distributed.checkpoint import Progress, save, step_folder, validated_folder
from mltfr_dist.distributed.engine import Engine, peak_memory_bytes
from mltfr_dist.distributed.kept import latest, prune
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.distributed.state import whole_parameter
from mltfr_dist.distributed.watchdog import beat
from mltfr_dist.errors import MltfrError, StoppedError
from mltfr_dist.models.mltfr import MLTFR, RoutingSums
from mltfr_dist.models.recommender import TrainingOutput
from mltfr_dist.training.evaluate import evaluate
from mltfr_dist.training.tracking import STAGES, Tracker, seed_all

SPLIT_WORDS = {"valid": "validation", "test": "test (picked on)"}


@dataclass
class StepTotals:
    """Means over the global batch of one step."""

    terms: dict[str, float]
    """Of the loss, by name."""
    routing: RoutingSums | None = None
    """Means over real positions."""
    nonfinite: tuple[str, ...] = ()
    """What was not finite on some rank, by name; the update was then skipped."""

    @property
    def loss(self) -> float:
        """The recommendation loss."""
        return self.terms["loss"]


@dataclass(frozen=True)
class Stage:
    """Everything that one stage of training needs."""

    name: str
    epochs: int
    config: RunConfig
    checkpoints: Path
    ranks: Ranks
    engine: Engine
    stream: TrainStream
    valid: Iterable[RankingBatch]
    tracker: Tracker
    table_names: tuple[str, ...]

    @property
    def total_steps(self) -> int:
        """Updates of the stage if nothing stops it early."""
        return self.epochs * self.stream.steps_per_epoch


def train_stage(stage: Stage, progress: Progress) -> Progress:
    """Train until the epochs or the patience are used up; checkpoints as it goes."""
    if progress.step == 0 and stage.name != STAGES[0]:
        progress = validate(stage, progress)  # what the new expert changes before any training
    while not is_finished(stage.config, progress, stage.epochs):
        progress = train_epoch(stage, progress)
        if (
            progress.epoch % stage.config.evaluation.every_epochs == 0
            or progress.epoch == stage.epochs
        ):
            try:
                progress = validate(stage, progress)
            except StoppedError:
                save_checkpoint(stage, before_validation(stage, progress))
                raise
        save_checkpoint(stage, progress)
    return progress


def before_validation(stage: Stage, progress: Progress) -> Progress:
    """Where an epoch is over and not yet validated: what goes on from there validates first."""
    return progress.model_copy(
        update={"epoch": progress.epoch - 1, "step_in_epoch": stage.stream.steps_per_epoch}
    )


def is_finished(config: RunConfig, progress: Progress, epochs: int) -> bool:
    """Whether a stage has used up its epochs, or `training.patience` validations without a better one."""
    waited = progress.epoch - progress.best_epoch if progress.best_epoch >= 0 else 0
    return (
        progress.epoch >= epochs
        or waited >= config.training.patience * config.evaluation.every_epochs
    )


def train_epoch(stage: Stage, progress: Progress) -> Progress:
    """Train to the end of the epoch that ``progress`` is in."""
    every = stage.config.checkpoint.every_steps
    started, before = time.monotonic(), progress.train_seconds
    stage.engine.deepspeed.train()
    for batches in stage.stream.epoch(progress.epoch, progress.step_in_epoch):
        totals = train_step(stage, batches, progress.step)
        skipped = bool(totals.nonfinite)
        progress = progress.model_copy(
            update={
                "step": progress.step + 1,
                "step_in_epoch": progress.step_in_epoch + 1,
                "skipped_steps": progress.skipped_steps + skipped,
                "skipped_in_a_row": progress.skipped_in_a_row + 1 if skipped else 0,
                "train_seconds": before + time.monotonic() - started,
            }
        )
        beat(f"step {progress.step} of stage `{stage.name}`")
        if skipped:
            note_skipped(stage, progress, totals)
        else:
            log_step(stage, progress, totals, batches.num_targets)
        stop = stage.engine.verdict.stop
        if stop or (
            every
            and progress.step % every == 0
            and progress.step_in_epoch < stage.stream.steps_per_epoch
        ):
            save_checkpoint(stage, progress)
        if stop:
            what = f"A signal asked the run to stop; it did after step {progress.step} of stage `{stage.name}`."
            raise stage.ranks.one_speaks(
                StoppedError(what, remedy="Start the same command again and it goes on.")
            )
    return progress.model_copy(update={"epoch": progress.epoch + 1, "step_in_epoch": 0})


def train_step(stage: Stage, batches: StepBatches, step: int) -> StepTotals:
    """One update: filter's shortlist when due, forward, backward, optimizer, router load.

    Where a loss or gradient is not finite on any rank, nothing is updated on any.
    """
    engine, ranks, config = stage.engine, stage.ranks, stage.config
    recall = engine.module.before_update(step, batches.micro_batches, ranks)
    if recall is not None and step:
        names = (f"filter_shortlist_recall/{name}" for name in stage.table_names)
        stage.tracker.log("filter", step + 1, dict(zip(names, recall.tolist(), strict=True)))
    seed_all(config.training.seed, STAGES.index(stage.name), step, ranks.rank)
    outputs = engine.update(batches, step)
    totals = reduce_outputs(ranks, outputs, batches)
    if engine.verdict.nonfinite:
        totals.nonfinite = engine.verdict.nonfinite
    gate = None if totals.nonfinite or totals.routing is None else totals.routing.gate
    engine.module.after_update(gate)
    return totals


def note_skipped(stage: Stage, progress: Progress, totals: StepTotals) -> None:
    """Record a skipped step. All ranks must call.

    Raises:
        MltfrError: More were skipped in a row than may be.
    """
    limit, row, names = (
        stage.config.training.max_skipped_steps,
        progress.skipped_in_a_row,
        ", ".join(totals.nonfinite),
    )
    values = {"in_a_row": float(row), "in_stage": float(progress.skipped_steps)}
    stage.tracker.log(
        "skipped", progress.step, values, epoch=progress.epoch, nonfinite=list(totals.nonfinite)
    )
    stage.tracker.say(
        f"  step {progress.step} of stage `{stage.name}` skipped ({row} in a row), not finite: {names}"
    )
    if row > limit:
        last = latest(stage.checkpoints, stage.name)
        raise stage.ranks.one_speaks(
            MltfrError(
                f"The last {row} steps, up to {progress.step} of stage `{stage.name}`, had no finite loss and gradient; "
                f"not finite: {names}.",
                rule=f"More than training.max_skipped_steps ({limit}) stop the run. No parameter was changed by them.",
                remedy=(f"The run can go on from {last.name}, before them. " if last else "")
                + "Lower optimizer.learning_rate or set optimizer.max_grad_norm.",
            )
        )


def reduce_outputs(ranks: Ranks, outputs: list[TrainingOutput], batches: StepBatches) -> StepTotals:
    """Sum a step's outputs over micro-batches and ranks, in one collective."""
    sums: dict[str, Tensor] = {}
    for output in outputs:
        found = {name: term.sum.detach().view(1) for name, term in output.terms.items()}
        found |= {} if output.routing is None else output.routing._asdict()
        for name, value in found.items():
            sums[name] = sums[name] + value.double() if name in sums else value.double()
    total = ranks.sum(torch.cat(list(sums.values()))).cpu()
    sizes = [len(value) for value in sums.values()]
    reduced = dict(zip(sums, torch.split(total, sizes), strict=True))
    counts: dict[str, float] = {**batches.counts()}
    routing = None
    if outputs[0].routing is not None:
        # The gates of a position sum to 1, so their sum counts positions.
        positions = reduced["gate"].sum()
        counts["positions"] = float(positions)
        gate, top, entropy = (reduced[name] / positions for name in RoutingSums._fields)
        routing = RoutingSums(gate.float(), top.float(), entropy)
    terms = {
        name: float(reduced[name]) / counts[term.over] for name, term in outputs[0].terms.items()
    }
    return StepTotals(terms, routing)


def exp_or_inf(power: float) -> float:
    """Exponential of ``power``; infinity where that is no finite number any more, for which math.exp raises."""
    try:
        return math.exp(power)
    except OverflowError:
        return math.inf


def log_step(stage: Stage, progress: Progress, totals: StepTotals, num_targets: int) -> None:
    """metrics.jsonl, TensorBoard and the screen, on schedule. All ranks must call."""
    step, config = progress.step, stage.config
    stage.tracker.progress(step, stage.total_steps, config.training.global_batch_size, totals.loss)
    if (
        step % config.training.log_every_steps
        and progress.step_in_epoch < stage.stream.steps_per_epoch
    ):
        return
    values = totals.terms | {
        "learning_rate": float(stage.engine.optimizer.param_groups[0]["lr"]),
        "positions": float(num_targets),
    }
    norm = stage.engine.grad_norm()
    if norm is not None:
        values["grad_norm"] = norm
    mltfr = stage.engine.module.mltfr
    if mltfr is not None and totals.routing is not None:
        values |= mltfr_values(stage, mltfr, totals.routing)
    stage.tracker.log("step", step, values, epoch=progress.epoch)
    speed = progress.step * config.training.global_batch_size / max(1e-9, progress.train_seconds)
    stage.tracker.board(
        {"speed/sequences_per_second": speed, "memory/peak_gib": peak_memory_bytes() / 2**30}, step
    )


def mltfr_values(stage: Stage, mltfr: MLTFR, routing: RoutingSums) -> dict[str, float]:
    """What is logged of MLTFR: its gate's means, and its learned scalars. All ranks must call."""
    values = {
        "gate/entropy": float(routing.entropy),
        "gate/max_weight": float(routing.gate.max()),
        "gate/max_top_share": float(routing.top.max()),
    }
    for e, name in enumerate(mltfr.gate_names(stage.table_names)):
        values[f"gate_weight/{name}"] = float(routing.gate[e])
        values[f"gate_top_share/{name}"] = float(routing.top[e])
    if mltfr.consensus is not None and mltfr.config.consensus.learn_weight:
        values["consensus/weight"] = float(whole_parameter(stage.engine, mltfr.consensus_weight))
    for m, name in enumerate(stage.table_names):
        log_tau = mltfr.selector(m).log_tau()
        if log_tau is not None:
            power = float(whole_parameter(stage.engine, log_tau))
            values[f"filter_temperature/{name}"] = exp_or_inf(power)
    return values


def validate(stage: Stage, progress: Progress) -> Progress:
    """Full ranking of the validation split; keeps the weights if they are among the best so far."""
    started = time.monotonic()
    stage.engine.deepspeed.eval()
    metrics = evaluate(stage.engine.module, stage.valid, stage.config.evaluation, stage.ranks)
    progress = progress.model_copy(
        update={"train_seconds": progress.train_seconds + time.monotonic() - started}
    )
    value = metrics[stage.config.evaluation.select_by]
    validated = sorted([*progress.best, (progress.epoch, value)], key=lambda p: (-p[1], p[0]))
    progress = progress.model_copy(
        update={"best": tuple(validated[: stage.config.checkpoint.keep_best])}
    )
    best = progress.best_epoch == progress.epoch
    if progress.epoch in dict(progress.best):
        place = validated_folder(stage.checkpoints, stage.name, progress.epoch)
        save(place, stage.engine, progress, with_optimizer=False)
    split = stage.config.evaluation.select_on
    stage.tracker.log(
        split if split == "valid" else "picked_on_test",
        progress.step,
        metrics,
        epoch=progress.epoch,
    )
    stage.tracker.say(
        f"  {stage.name} epoch {progress.epoch}/{stage.epochs}  {SPLIT_WORDS[split]} HR@10 {metrics['HR@10']:.4f}  "
        f"NDCG@10 {metrics['NDCG@10']:.4f}{' *' if best else ''}  ({progress.train_seconds:.0f} s)"
    )
    return progress


def save_checkpoint(stage: Stage, progress: Progress) -> None:
    """Save, then delete what it supersedes. All ranks must call.

    Not in a row of skipped steps: a run that goes on from before them gives them another chance.
    """
    if progress.skipped_in_a_row:
        return
    save(step_folder(stage.checkpoints, progress), stage.engine, progress)
    keep_last = stage.config.checkpoint.keep_last
    stage.ranks.main_works(lambda _: prune(stage.checkpoints, progress, keep_last))
