"""Training: a step, an epoch, a stage. `fit.py` puts stages together to a run."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mltfr_dist.config import RunConfig
from mltfr_dist.data.batch import RankingBatch
from mltfr_dist.data.stream.training import StepBatches, TrainStream
from mltfr_dist.distributed.checkpoint import Progress, step_folder, validated_folder
from mltfr_dist.distributed.engine import Engine
from mltfr_dist.distributed.kept import latest, prune
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.distributed.resources import memory_gib
from mltfr_dist.distributed.saver import Saver
from mltfr_dist.distributed.signals import pauses_after
from mltfr_dist.distributed.watchdog import heartbeat
from mltfr_dist.errors import MltfrError, StoppedError
from mltfr_dist.training.evaluating.evaluate import evaluate
from mltfr_dist.training.evaluating.rankers import ByModel, MeanLoss
from mltfr_dist.training.reporting.tracking import Tracker
from mltfr_dist.training.run_folder import STAGES
from mltfr_dist.training.running.speed import Speed
from mltfr_dist.training.running.step_values import (
    StepTotals,
    board_values,
    step_totals,
    step_values,
)
from mltfr_dist.training.seeds import seed_all
from mltfr_dist.training.using.explain import TokenSample

SPLIT_WORDS = {"valid": "validation", "test": "test (picked on)"}


@dataclass(frozen=True)
class Stage:
    """Everything that one stage of training needs."""

    name: str
    epochs_before: int
    """Of earlier stages."""
    epochs: int
    config: RunConfig
    checkpoints: Path
    ranks: Ranks
    engine: Engine
    stream: TrainStream
    valid: Iterable[RankingBatch]
    tracker: Tracker
    table_names: tuple[str, ...]
    speed: Speed
    sample: TokenSample | None

    @cached_property
    def saver(self) -> Saver:
        """Writes the stage's checkpoints."""
        return Saver(self.engine, background=self.config.checkpoint.background)

    @property
    def total_steps(self) -> int:
        """Updates of the stage if nothing stops it early."""
        return self.epochs * self.stream.steps_per_epoch


def train_stage(stage: Stage, progress: Progress) -> Progress:
    """Train until the epochs or the patience are used up; checkpoints as it goes."""
    with stage.saver:
        return _train_stage(stage, progress)


def _train_stage(stage: Stage, progress: Progress) -> Progress:
    if progress.step == 0 and stage.name != STAGES[0]:
        progress = validate(stage, progress)  # what the new expert changes before any training
    while not is_finished(stage.config, progress, stage.epochs):
        progress = train_epoch(stage, progress)
        every = stage.config.evaluation.every_epochs
        validates = progress.epoch % every == 0 or progress.epoch == stage.epochs
        if validates:
            try:
                progress = validate(stage, progress)
            except StoppedError:
                save_checkpoint(stage, before_validation(stage, progress))
                stage.saver.finish()
                raise
        save_checkpoint(stage, progress)
        if validates and pauses_after(stage.epochs_before + progress.epoch):
            stage.saver.finish()
            raise stage.ranks.rank0_raises(
                StoppedError(
                    f"The run was to pause after epoch {progress.epoch} of stage `{stage.name}`.",
                    remedy="Start the same command again and it goes on.",
                )
            )
    stage.saver.finish()
    return progress


def before_validation(stage: Stage, progress: Progress) -> Progress:
    """Where an epoch is over and not yet validated: what goes on from there validates first."""
    return progress.model_copy(
        update={"epoch": progress.epoch - 1, "step_in_epoch": stage.stream.steps_per_epoch}
    )


def is_finished(config: RunConfig, progress: Progress, epochs: int) -> bool:
    """Whether a stage has used up its epochs, or `training.patience` validations without a better
    one.
    """
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
    steps = stage.stream.epoch(progress.epoch, progress.step_in_epoch)
    for batches in stage.speed.waits(steps):
        with stage.speed.step(batches):
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
        heartbeat(f"step {progress.step} of stage `{stage.name}`")
        if skipped:
            note_skipped(stage, progress, totals)
        else:
            log_step(stage, progress, totals, batches)
        if not stage.engine.verdict.writes:
            stage.saver.finish()
        stop = stage.engine.verdict.stop
        if stop or (
            every
            and progress.step % every == 0
            and progress.step_in_epoch < stage.stream.steps_per_epoch
        ):
            save_checkpoint(stage, progress)
        if stop:
            stage.saver.finish()
            what = (
                f"A signal asked the run to stop; it did after step {progress.step} of stage "
                f"`{stage.name}`."
            )
            raise stage.ranks.rank0_raises(
                StoppedError(what, remedy="Start the same command again and it goes on.")
            )
    return progress.model_copy(update={"epoch": progress.epoch + 1, "step_in_epoch": 0})


def train_step(stage: Stage, batches: StepBatches, step: int) -> StepTotals:
    """One update: filter's shortlist when due, forward, backward, optimizer, router load.

    Where a loss or gradient is not finite on any rank, nothing is updated on any.
    """
    engine, ranks, config = stage.engine, stage.ranks, stage.config
    recall = engine.module.before_update(step, batches.micro_batches, ranks)
    if recall is not None and step:  # part of the update that it precedes
        names = (f"filter_shortlist_recall/{name}" for name in stage.table_names)
        stage.tracker.log("filter", step + 1, dict(zip(names, recall.tolist(), strict=True)))
    seed_all(config.training.seed, STAGES.index(stage.name), step, ranks.rank)
    with stage.speed.counted():
        output = engine.update(batches, step, forms_norm=is_logged(stage, step + 1))
    totals = step_totals(output, batches)
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
        f"  step {progress.step} of stage `{stage.name}` skipped ({row} in a row), not finite: "
        f"{names}"
    )
    if row > limit:
        stage.saver.finish()
        last = latest(stage.checkpoints, stage.name)
        raise stage.ranks.rank0_raises(
            MltfrError(
                f"The last {row} steps, up to {progress.step} of stage `{stage.name}`, had no "
                f"finite loss and gradient; "
                f"not finite: {names}.",
                rule=f"More than training.max_skipped_steps ({limit}) stop the run. No parameter "
                f"was changed by them.",
                remedy=(f"The run can go on from {last.name}, before them. " if last else "")
                + "Lower optimizer.learning_rate or set optimizer.max_grad_norm.",
            )
        )


def is_logged(stage: Stage, step: int) -> bool:
    """Whether metrics.jsonl has a line of the state after ``step`` updates of the stage."""
    every = (stage.config.training.log_every_steps, stage.stream.steps_per_epoch)
    return any(step % steps == 0 for steps in every)


def log_step(stage: Stage, progress: Progress, totals: StepTotals, batches: StepBatches) -> None:
    """metrics.jsonl, TensorBoard and the screen, on schedule. All ranks must call."""
    step, config = progress.step, stage.config
    stage.tracker.progress(step, stage.total_steps, config.training.global_batch_size, totals.loss)
    if not is_logged(stage, step):
        return
    values = step_values(stage.engine, totals, batches.num_targets, stage.table_names)
    stage.tracker.log("step", step, values, epoch=progress.epoch)
    stage.tracker.board(board_values(totals, stage.table_names), step)
    stage.tracker.board({"run/stage": STAGES.index(stage.name) + 1.0}, step)
    stage.tracker.board(stage.speed.take() | memory_gib(), step)


def validate(stage: Stage, progress: Progress) -> Progress:
    """Full ranking of the validation split; keeps the weights if they are among the best so far."""
    started = time.monotonic()
    stage.engine.deepspeed.eval()
    loss = MeanLoss(stage.ranks)
    model = ByModel(stage.engine.module, loss)
    metrics = evaluate(model, stage.valid, stage.config.evaluation, stage.ranks)
    mean_loss = loss.mean()
    texts = stage.sample.texts(stage.engine.module) if stage.sample else {}
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
        folder = validated_folder(stage.checkpoints, stage.name, progress.epoch)
        stage.saver.save(folder, progress, with_optimizer=False)
    split = stage.config.picks_on
    kind = split if split == "valid" else "picked_on_test"
    stage.tracker.log(kind, progress.step, metrics, epoch=progress.epoch)
    stage.tracker.board({f"{kind}/loss": mean_loss}, progress.step)
    for tag, text in texts.items():
        stage.tracker.text(tag, text, progress.step)
    stage.tracker.say(
        f"  {stage.name} epoch {progress.epoch}/{stage.epochs}  {SPLIT_WORDS[split]} HR@10 "
        f"{metrics['HR@10']:.4f}  "
        f"NDCG@10 {metrics['NDCG@10']:.4f}{' *' if best else ''}  ({progress.train_seconds:.0f} s)"
    )
    return progress


def save_checkpoint(stage: Stage, progress: Progress) -> None:
    """Save, then delete what it supersedes. All ranks must call.

    Not in a row of skipped steps: a run that goes on from before them gives them another chance.
    """
    if progress.skipped_in_a_row:
        return
    stage.tracker.flush()
    folder, keep_last = stage.checkpoints, stage.config.checkpoint.keep_last
    stage.saver.save(
        step_folder(folder, progress), progress, then=lambda: prune(folder, progress, keep_last)
    )
