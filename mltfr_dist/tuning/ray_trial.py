"""One trial on Ray: Tune's trainable, which starts the workers of a run by Ray Train and reads its
metrics.jsonl.

The workers call the same ``fit()`` as train.py, in the trial's own run folder, and know nothing of
the sweep. So what Tune sees is what the run recorded; a trial that is started again goes on from
the run's last checkpoint, and replays nothing.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.exceptions import RayActorError
from ray.train import RunConfig as RayRunConfig
from ray.train.v2.api.exceptions import WorkerGroupError

from mltfr_dist.config import RunConfig
from mltfr_dist.errors import EXIT_BAD_INPUT, MltfrError, OtherRankError
from mltfr_dist.files import write_atomically
from mltfr_dist.schema import changed
from mltfr_dist.training.run_folder import load_result
from mltfr_dist.tuning.early_workers import EarlyGroup
from mltfr_dist.tuning.environment import set_environment
from mltfr_dist.tuning.rank import POLL_SECONDS, train_worker
from mltfr_dist.tuning.records import DIED, Trial, Validation, group_path, load_trial
from mltfr_dist.tuning.snapshots import make_run, take_snapshot
from mltfr_dist.tuning.space import SweepConfig, with_values
from mltfr_dist.tuning.train_group import TorchRanks, Trainer, scaling
from mltfr_dist.tuning.turns import Turns
from mltfr_dist.tuning.workers import Group, TrialWorkers, release, release_waiting

EPOCH, OBJECTIVE, NUMBER, GENERATION = "epoch", "objective", "trial", "generation"
SNAPSHOT = "snapshot"
"""File in a checkpoint of Tune's: where the snapshot lies."""

NOTHING: dict[str, Any] = {EPOCH: 0, OBJECTIVE: 0.0}
"""What a trial reports that fails before its first validation."""

STOP = "stop"
"""File in the sweep's folder: every running trial saves, and ends."""

STOP_SECONDS = 300.0
"""How long a trial that was asked to stop may take to save."""

END_SECONDS = 30.0
"""How long a trial that was stopped early may take to save; then its processes end with it."""


@dataclass(frozen=True)
class TrialSetting:
    """What all trials of a sweep share."""

    sweep: SweepConfig
    base: RunConfig
    folder: Path
    """Of the sweep, absolute."""
    directory: Path
    """Where relative paths of the configuration begin."""
    read_test: bool = False
    early: Sequence[EarlyGroup] = ()
    """Workers that were started in advance."""

    def config(self, trial: Trial) -> RunConfig:
        """The run's configuration."""
        config = with_values(self.base, trial.values)
        own = {"name": trial.name, "runs_dir": trial.folder.parent}
        return changed(config, own, source="the sweep")


class Attempt(threading.Thread):
    """The training of a trial, or a turn of it, in a thread of the process that watches it."""

    def __init__(self, trainer: Trainer, group: Path, until: int | None) -> None:
        """Begins with :meth:`start`.

        Args:
            trainer: Of its workers.
            group: File that names their placement group; gone once they have done well, for then
                they wait for another trial.
            until: Epochs after which the run pauses; None: it goes to its end.
        """
        super().__init__(name="train", daemon=True)
        self.trainer, self.group, self.until = trainer, group, until
        self.error: BaseException | None = None

    def run(self) -> None:
        """Train, and keep what was raised."""
        try:
            self.trainer.fit()
            self.group.unlink(missing_ok=True)
        except BaseException as error:
            self.error = error

    def ended_well(self) -> bool:
        """Whether it is over, and its workers wait for another trial."""
        return not self.is_alive() and self.error is None

    def pauses_after(self, epochs: int) -> bool:
        """Whether the run pauses once it has so many behind it."""
        return self.until is not None and epochs >= self.until


class SweepTrial(tune.Trainable):  # type: ignore[misc]
    """Runs one trial, or several in turn; a step is a validation."""

    def setup(self, config: dict[str, Any], setting: TrialSetting) -> None:
        """Called by Tune in a new process."""
        os.chdir(setting.directory)
        set_environment()  # a cluster that was there before the sweep does not have it
        self.setting = setting
        Group.early = setting.early
        self._take(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Called by Tune where the process gets another trial, which saves the start of one, and of
        the workers where these end theirs in time.
        """
        if self.attempt is not None and self.attempt.is_alive():  # the trial was stopped early
            self.workers.ask_to_stop()
            self.attempt.join(END_SECONDS)
            if self.attempt.is_alive():
                release(self.group)
                self.attempt.join(END_SECONDS)
                release_waiting()  # had it ended in this moment: its group is gone
        self._take(new_config)
        return True

    def _take(self, config: dict[str, Any]) -> None:
        self.generation = config[GENERATION]
        self.values = {k: v for k, v in config.items() if k not in (NUMBER, GENERATION)}
        self.record = load_trial(self.setting.folder, config[NUMBER])
        self.turns = Turns.of(self.setting.sweep, self.setting.config(self.record))
        self.group = group_path(self.setting.folder, config[NUMBER])
        validations = self.record.validations()
        self.seen = len(validations) - self.turns.ended(
            validations
        )  # an exchange may not have been done
        self.attempt: Attempt | None = None
        self.workers = TrialWorkers(self.group)

    def step(self) -> dict[str, Any]:
        """Wait for the next validation; for one after which the run pauses until it has.

        Raises:
            RuntimeError: The run failed; in its own words.
        """
        while True:
            # Asked before reading: what a thread that has ended wrote is there.
            attempt = self.attempt
            running = attempt is not None and attempt.is_alive()
            validations = self.record.validations()
            new = validations[self.seen : self.seen + 1]
            if new and not (running and attempt and attempt.pauses_after(new[0].epoch)):
                self.seen += 1
                return self._result(validations[: self.seen])
            if not running and self._sweep_stops():
                return self._over(validations)
            if attempt is None or (not running and self._goes_on(attempt, validations)):
                # Of an attempt that was lost with its node. Not before a step: Tune may start two
                # of these processes for a trial, and use one.
                release(self.group)
                self.record.failure.unlink(missing_ok=True)
                until = self.turns.end_after(validations[-1].epoch if validations else 0)
                self.attempt = Attempt(self._trainer(until), self.group, until)
                self.attempt.start()
            elif not running:
                return self._ended(attempt, validations)
            time.sleep(POLL_SECONDS)

    def _goes_on(self, attempt: Attempt, validations: list[Validation]) -> bool:
        paused = bool(validations) and attempt.pauses_after(validations[-1].epoch)
        return paused and attempt.ended_well() and load_result(self.record.folder) is None

    def _ended(self, attempt: Attempt, validations: list[Validation]) -> dict[str, Any]:
        if attempt.error is None:
            return self._over(validations)
        reason, cause = describe(attempt.error), root_cause(attempt.error)
        write_atomically(self.record.failure, reason + "\n")
        if not can_pass(cause):
            self.record = self.record.end("failed", reason)
            return self._over(validations)
        raise RuntimeError(reason) from None

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """PBT: all that another trial needs to go on in this one's place."""
        epochs = self.record.validations()[self.seen - 1].epoch
        snapshot = take_snapshot(self.record, epochs)
        (Path(checkpoint_dir) / SNAPSHOT).write_text(str(snapshot))

    def load_checkpoint(self, checkpoint: Any) -> None:
        """PBT: go on from another trial's checkpoint with this one's new values, as a run of its
        own.

        Where PBT only paused the trial, its own run goes on.
        """
        if self.generation > self.record.record.generation:
            self.record = self.record.next_generation(self.values)
            snapshot = Path((Path(checkpoint) / SNAPSHOT).read_text())
            make_run(self.setting.config(self.record), snapshot)
            self.record.save()
        self.seen = len(self.record.validations())

    def cleanup(self) -> None:
        """End the workers: where the sweep stops, once they have saved; where the trial alone does,
        at once.
        """
        if self.attempt is not None and self._sweep_stops():
            self.attempt.join(STOP_SECONDS)
        if self.attempt is not None and not self.attempt.ended_well():
            release(self.group)  # else its trial may go on elsewhere by now, with another group
        release_waiting()

    def _sweep_stops(self) -> bool:
        return (self.setting.folder / STOP).exists()

    def _over(self, validations: list[Validation]) -> dict[str, Any]:
        return (self._result(validations) if validations else NOTHING) | {"done": True}

    def _result(self, validations: list[Validation]) -> dict[str, Any]:
        name = self.setting.sweep.metric_name
        return {EPOCH: validations[-1].epoch, OBJECTIVE: max(v.metrics[name] for v in validations)}

    def _trainer(self, until: int | None) -> Trainer:
        resources, config = self.setting.sweep.resources_per_trial, self.setting.config(self.record)
        given = {
            "config": config.model_dump(mode="json"),
            "directory": str(self.setting.directory),
            "stop": str(self.setting.folder / STOP),
            "log": str(self.record.folder.with_suffix(".log")),
            "read_test": self.setting.read_test,
            "until": until,
        }
        return Trainer(
            train_worker,
            train_loop_config=given,
            backend_config=TorchRanks(resources.gpus > 0, int(config.training.hang_seconds) + 60),
            scaling_config=scaling(resources),
            run_config=RayRunConfig(
                name=f"{self.trial_id}-{self.record.name}",
                storage_path=str(self.setting.folder / "ray"),
                callbacks=[self.workers],
            ),
        )


def root_cause(error: BaseException) -> BaseException:
    """What the rank that knows has raised."""
    if not isinstance(error, WorkerGroupError):
        return error
    failures = [unwrapped(cause) for _, cause in sorted(error.worker_failures.items())]
    return next((cause for cause in failures if not isinstance(cause, OtherRankError)), failures[0])


def can_pass(error: BaseException) -> bool:
    """Whether the same run may succeed if it is started again: what was refused, or was not finite,
    will be so again.
    """
    return not isinstance(error, MltfrError) or error.exit_code != EXIT_BAD_INPUT


def describe(error: BaseException) -> str:
    """Why a run failed, in one line, in the words of the rank that knows."""
    error = root_cause(error)
    if isinstance(error, RayActorError):
        return DIED
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no reason given'}"


def unwrapped(error: BaseException) -> BaseException:
    """What a worker raised, out of what Ray puts around it."""
    inner = (
        getattr(error, "cause", None)
        or getattr(error, "health_check_failure", None)
        or error.__cause__
    )
    return unwrapped(inner) if isinstance(inner, BaseException) else error
