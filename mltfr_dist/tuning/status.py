"""What a sweep says of itself: how its trials begin and end, and how far it is."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial as RayTrial

from mltfr_dist.progress import duration, say
from mltfr_dist.tuning.hparams import write_hparams
from mltfr_dist.tuning.ray_trial import EPOCH, GENERATION, NUMBER, STOP, TrialSetting
from mltfr_dist.tuning.ray_watch import Room, room_is_low
from mltfr_dist.tuning.records import Trial, group_path, load_trial, load_trials
from mltfr_dist.tuning.space import shown
from mltfr_dist.tuning.suggest import Space
from mltfr_dist.tuning.turns import most_epochs

STATUS_SECONDS = 30.0
"""Seconds between two lines that say how far the sweep is, where no trial ends."""


@dataclass
class Running:
    """A trial that runs."""

    began: float
    """By the clock."""
    first: int
    """Epochs that it had behind it then."""
    epoch: int
    """Epochs that it has behind it."""

    def pace(self, now: float) -> float | None:
        """Seconds an epoch; None before the first."""
        done = self.epoch - self.first
        return (now - self.began) / done if done else None


class Progress(Callback):  # type: ignore[misc]
    """Notes how trials end, and says how far the sweep is."""

    def __init__(
        self,
        setting: TrialSetting,
        space: Space,
        concurrent: int,
        missing: int,
        take_signals: Callable[[], None],
    ) -> None:
        self.setting, self.space, self.concurrent = setting, space, concurrent
        self.missing, self.take_signals = missing, take_signals
        self.began = self.said = time.monotonic()
        self.running: dict[int, Running] = {}
        self.seconds: list[float] = []
        self.room, self.no_room = Room(), False
        self.epochs = most_epochs(setting.base)

    def setup(
        self,
        stop: Any = None,
        num_samples: int | None = None,
        total_num_samples: int | None = None,
        **info: Any,
    ) -> None:
        """Called by Tune before the first trial."""
        self.take_signals()
        sweep = self.setting.sweep
        say(
            f"sweep `{sweep.name}`: {self.missing} of {self.space.num_trials} trials to do, "
            f"{self.concurrent} at a time, "
            f"up to {self.epochs} epochs each; tensorboard --logdir {self.setting.folder}",
        )

    def on_trial_start(
        self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any
    ) -> None:
        """Called by Tune."""
        number = trial.config[NUMBER]
        ours = load_trial(self.setting.folder, number)
        behind = ours.validations()
        going_on = f", going on after epoch {behind[-1].epoch}" if behind else ""
        if trial.config[GENERATION] > ours.record.generation:  # not before it has begun
            values = {key: trial.config[key] for key in self.setting.sweep.search}
            ours = ours.next_generation(values)
        done = behind[-1].epoch if behind else 0
        self.running.setdefault(number, Running(time.monotonic(), done, done))
        say(f"  trial {ours.name}  {shown(ours.values)}{going_on}")

    def on_trial_result(
        self,
        iteration: int,
        trials: list[RayTrial],
        trial: RayTrial,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        """Called by Tune for each validation."""
        if (running := self.running.get(trial.config[NUMBER])) is not None:
            running.epoch = max(running.epoch, result[EPOCH])

    def on_trial_recover(
        self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any
    ) -> None:
        """Called by Tune where a trial failed and is started again."""
        ours = load_trial(self.setting.folder, trial.config[NUMBER])
        say(f"  trial {ours.name}  failed and is started again: {ours.reason}")

    def on_trial_error(
        self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any
    ) -> None:
        """Called by Tune where a trial failed for good. Without room it is not the trial's fault:
        it goes on when the sweep is started again.
        """
        ours = load_trial(self.setting.folder, trial.config[NUMBER])
        if room_is_low():
            self.no_room = True
            self.running.pop(ours.number, None)
            say(f"  trial {ours.name}  stays unfinished: no room to start its process")
            return
        self._over(ours.end("failed", ours.reason), f"failed: {ours.reason}")

    def on_trial_complete(
        self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any
    ) -> None:
        """Called by Tune where a trial is over, is stopped early, or stops with the sweep."""
        ours = load_trial(self.setting.folder, trial.config[NUMBER])
        if ours.state == "unfinished":
            if (self.setting.folder / STOP).exists():
                return
            ours = ours.end(
                "stopped", f"{self.setting.sweep.scheduler} after epoch {trial.last_result[EPOCH]}"
            )
        ended = ours.record.ended
        verb = "failed: " if ended and ended.state == "failed" else "stopped by "
        self._over(ours, "finished" if ended is None else verb + ended.reason)

    def on_step_end(self, iteration: int, trials: list[RayTrial], **info: Any) -> None:
        """Called by Tune all the time."""
        trains = any(
            trial.status == RayTrial.RUNNING
            and group_path(self.setting.folder, trial.config[NUMBER]).exists()
            for trial in trials
        )
        if not self.no_room and self.room.is_needed(trains=trains):
            self.no_room = True
            (self.setting.folder / STOP).touch()
        if time.monotonic() - self.said > STATUS_SECONDS:
            self._status()

    def _over(self, trial: Trial, how: str) -> None:
        now = time.monotonic()
        running = self.running.pop(trial.number, None)
        self.seconds.append(now - running.began if running else 0.0)
        sweep = self.setting.sweep
        best = trial.best(sweep.metric_name)
        if not self.setting.read_test:
            write_hparams(trial)
        value = "" if best is None else f"  {sweep.metric} {best:.4f}"
        say(f"  trial {trial.name}  {how}{value}  ({self.seconds[-1]:.0f} s)")
        self._status()

    def _status(self) -> None:
        self.said = time.monotonic()
        sweep, over = self.setting.sweep, len(self.seconds)
        values = {
            t.name: t.best(sweep.metric_name)
            for t in load_trials(self.setting.folder)
            if t.state != "failed"
        }
        best = max(
            ((value, name) for name, value in values.items() if value is not None), default=None
        )
        text = f"  {over}/{self.missing} trials over" + (
            f", best {sweep.metric} {best[0]:.4f} (trial {best[1]})" if best else ""
        )
        left = self._left(time.monotonic())
        if left is not None and over < self.missing:
            text += f", about {duration(left)} left"
        say(text)

    def _left(self, now: float) -> float | None:
        running, waiting = list(self.running.values()), self.missing - len(self.seconds)
        if self.setting.sweep.scheduler == "pbt":  # it takes turns: no trial has a pace of its own
            done = sum(one.epoch - one.first for one in running) + self.epochs * len(self.seconds)
            todo = sum(self.epochs - one.epoch for one in running)
            todo += self.epochs * (waiting - len(running))
            return (now - self.began) / done * todo if done else None
        return seconds_left(
            now,
            running,
            self.seconds,
            waiting - len(running),
            self.concurrent,
            self.epochs,
            stops=self.setting.sweep.scheduler == "asha",
        )


def seconds_left(
    now: float,
    running: Sequence[Running],
    over: Sequence[float],
    waiting: int,
    concurrent: int,
    epochs: int,
    *,
    stops: bool,
) -> float | None:
    """Seconds until the last trial is over; None as long as nothing is known of their pace.

    A trial that waits takes what those that are over took, stopped ones included, or else what
    those that run will; it starts where a slot is free first.

    Args:
        now: Of the clock of ``running``.
        running: Those that run.
        over: Seconds of those that are over.
        waiting: How many have not begun.
        concurrent: Slots.
        epochs: Epochs of a trial that nothing stops.
        stops: Whether trials may be stopped early.
    """
    mean = sum(over) / len(over) if over else None
    paces = [one.pace(now) for one in running]
    known = [pace for pace in paces if pace is not None]
    each = mean if mean is not None else (epochs * sum(known) / len(known) if known else None)
    if each is None:
        return None
    slots = []
    for one, pace in zip(running, paces, strict=True):
        rest = each - (now - one.began)
        if pace is not None:
            own = pace * (epochs - one.epoch)
            rest = min(own, max(rest, pace)) if over and stops else own
        slots.append(max(rest, 1.0))
    slots += [0.0] * max(0, concurrent - len(slots))
    heapq.heapify(slots)
    for _ in range(waiting):
        heapq.heapreplace(slots, slots[0] + each)
    return max(slots)
