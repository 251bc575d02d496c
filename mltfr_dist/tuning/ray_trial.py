"""One trial on Ray: Tune's trainable, which starts the workers of a run by Ray Train and reads its
metrics.jsonl.

The workers call the same ``fit()`` as train.py, in the trial's own run folder, and know nothing of
the sweep. So what Tune sees is what the run recorded; a trial that is started again goes on from
the run's last checkpoint, and replays nothing.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from contextlib import suppress
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
from mltfr_dist.training.run_folder import CHECKPOINTS, CONFIG, INPUTS, dump_config
from mltfr_dist.tuning.environment import set_environment
from mltfr_dist.tuning.rank import POLL_SECONDS, train_worker
from mltfr_dist.tuning.records import DIED, METRICS, TRIALS, Trial, Validation, load_trial
from mltfr_dist.tuning.space import SweepConfig, with_values
from mltfr_dist.tuning.train_group import TorchRanks, Trainer, scaling
from mltfr_dist.tuning.workers import TrialWorkers, release, release_waiting

EPOCH, OBJECTIVE, NUMBER = "epoch", "objective", "trial"
OWNER = "owner"
"""File in a checkpoint of Tune's: the number of the trial that made it."""

NOTHING: dict[str, Any] = {EPOCH: 0, OBJECTIVE: 0.0}
"""What a trial reports that fails before its first validation."""

STOP = "stop"
"""File in the sweep's folder: every running trial saves, and ends."""

STOP_SECONDS = 300.0
"""How long a trial that was asked to stop may take to save."""

END_SECONDS = 30.0
"""How long a trial that was stopped early may take to save; then its processes end with it."""

COPY_ATTEMPTS = 3


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

    def config(self, trial: Trial) -> RunConfig:
        """The run's configuration."""
        config = with_values(self.base, trial.values)
        place = {"name": trial.name, "runs_dir": trial.folder.parent}
        return changed(config, place, source="the sweep")


class Attempt(threading.Thread):
    """The training of a trial, in a thread of the process that watches it."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(name="train", daemon=True)
        self.trainer = trainer
        self.error: BaseException | None = None

    def run(self) -> None:
        """Train, and keep what was raised."""
        try:
            self.trainer.fit()
        except BaseException as error:
            self.error = error


class SweepTrial(tune.Trainable):  # type: ignore[misc]
    """Runs one trial, or several in turn; a step is a validation."""

    def setup(self, config: dict[str, Any], setting: TrialSetting) -> None:
        """Called by Tune in a new process."""
        os.chdir(setting.directory)
        set_environment()  # a cluster that was there before the sweep does not have it
        self.setting = setting
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
        self.group.unlink(missing_ok=True)
        self._take(new_config)
        return True

    def _take(self, config: dict[str, Any]) -> None:
        self.values = {key: value for key, value in config.items() if key != NUMBER}
        self.record = load_trial(self.setting.folder, config[NUMBER])
        self.group = self.setting.folder / TRIALS / f"{config[NUMBER]:04d}.group"
        self.seen = len(self.record.validations())
        self.attempt: Attempt | None = None
        self.workers = TrialWorkers(self.group)
        release(self.group)  # of an attempt that was lost with its node
        self.record.failure.unlink(missing_ok=True)

    def step(self) -> dict[str, Any]:
        """Wait for the next validation.

        Raises:
            RuntimeError: The run failed; in its own words.
        """
        if self.attempt is None:
            self.attempt = Attempt(self._trainer())
            self.attempt.start()
        while True:
            # Asked before reading: what a thread that has ended wrote is there.
            running = self.attempt.is_alive()
            found = self.record.validations()
            if len(found) > self.seen:
                self.seen += 1
                return self._result(found[: self.seen])
            if not running:
                if self.attempt.error is None:
                    return self._result(found) | {"done": True}
                reason, cause = describe(self.attempt.error), root_cause(self.attempt.error)
                write_atomically(self.record.failure, reason + "\n")
                if not can_pass(cause):
                    self.record = self.record.end("failed", reason)
                    return (self._result(found) if found else NOTHING) | {"done": True}
                raise RuntimeError(reason) from None
            time.sleep(POLL_SECONDS)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """PBT: all that another trial needs to go on in this one's place."""
        run, place = self.record.folder, Path(checkpoint_dir)
        for _ in range(COPY_ATTEMPTS):
            with suppress(
                shutil.Error, FileNotFoundError
            ):  # the run deletes superseded checkpoints as it goes
                shutil.copytree(
                    run / CHECKPOINTS,
                    place / CHECKPOINTS,
                    ignore=shutil.ignore_patterns(".partial-*"),
                )
                break
            shutil.rmtree(place / CHECKPOINTS, ignore_errors=True)
        for name in (METRICS, INPUTS):
            shutil.copy(run / name, place)
        (place / OWNER).write_text(str(self.record.number))

    def load_checkpoint(self, checkpoint: Any) -> None:
        """PBT: go on from another trial's checkpoint with this one's new values, as a run of its
        own.

        Where PBT only paused the trial, its own run goes on.
        """
        place = Path(checkpoint)
        if (
            int((place / OWNER).read_text()) == self.record.number
            and self.values == self.record.values
        ):
            return
        self.record = self.record.next_generation(self.values)
        shutil.copytree(place, self.record.folder, ignore=shutil.ignore_patterns(OWNER, ".*"))
        write_atomically(self.record.folder / CONFIG, dump_config(self.setting.config(self.record)))
        self.seen = len(self.record.validations())

    def cleanup(self) -> None:
        """End the workers: where the sweep stops, once they have saved; where the trial alone does,
        at once.
        """
        if self.attempt is not None and (self.setting.folder / STOP).exists():
            self.attempt.join(STOP_SECONDS)
        release(self.group)
        release_waiting()

    def _result(self, validations: list[Validation]) -> dict[str, Any]:
        name = self.setting.sweep.metric_name
        return {EPOCH: validations[-1].epoch, OBJECTIVE: max(v.metrics[name] for v in validations)}

    def _trainer(self) -> Trainer:
        resources, config = self.setting.sweep.resources_per_trial, self.setting.config(self.record)
        given = {
            "config": config.model_dump(mode="json"),
            "directory": str(self.setting.directory),
            "stop": str(self.setting.folder / STOP),
            "log": str(self.record.folder.with_suffix(".log")),
            "read_test": self.setting.read_test,
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
