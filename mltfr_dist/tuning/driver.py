"""The sweep's own process: it gives trials to Ray Tune, notes how each ends, and says how far it is."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from ray import tune
from ray.tune import Callback, FailureConfig, Stopper, TuneConfig, Tuner
from ray.tune import RunConfig as TuneRunConfig
from ray.tune.experiment import Trial as RayTrial
from ray.tune.search import Searcher

from mltfr_dist.config import RunConfig
from mltfr_dist.errors import StoppedError
from mltfr_dist.tuning.cluster import Cluster
from mltfr_dist.tuning.hparams import write_all, write_hparams
from mltfr_dist.tuning.plan import known_trials, make_space, space_lines
from mltfr_dist.tuning.schedulers import make_scheduler, most_epochs
from mltfr_dist.tuning.search import Space, suggest
from mltfr_dist.tuning.space import SweepConfig, Values, shown
from mltfr_dist.tuning.trial import EPOCH, NUMBER, OBJECTIVE, STOP, SweepTrial, TrialSetting
from mltfr_dist.tuning.trials import Record, Trial, load_trial, load_trials, next_number

HEAD = "node:__internal_head__"
"""Ray's resource of which the head node alone has 1."""

TRIAL_RESOURCES = {HEAD: 0.0001}
"""What the process that watches a trial holds: it runs on the head node and takes no CPU from the workers.

Were it a CPU, as many watchers as there are CPUs could start and wait for workers that have none left.
"""

STATUS_SECONDS = 30.0
"""Seconds between two lines that say how far the sweep is, where no trial ends."""

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def run_trials(
    sweep: SweepConfig, base: RunConfig, folder: Path, cluster: Cluster, *, read_test: bool = False
) -> None:
    """Run the trials that a sweep still lacks.

    Args:
        sweep: The sweep.
        base: What its trials start from.
        folder: Where they lie.
        cluster: Where they run.
        read_test: Whether they read the test split at their end.

    Raises:
        StoppedError: A signal asked the sweep to stop; running trials have saved.
    """
    trials, space = load_trials(folder), make_space(sweep, base)
    missing = sum(trial.state == "unfinished" for trial in trials) + max(
        0, space.num_trials - len(trials)
    )
    if not read_test:
        write_all(trials)
    for line in space_lines(space):
        print(line, flush=True)
    if not missing:
        return
    (folder / STOP).unlink(missing_ok=True)
    setting = TrialSetting(sweep, base, folder, Path.cwd(), read_test)
    with stop_signals(folder / STOP) as take_signals:
        progress = Progress(setting, space, cluster.concurrent(sweep), missing, take_signals)
        make_tuner(setting, trials, progress).fit()
    if (folder / STOP).exists():
        raise StoppedError(
            f"A signal asked the sweep `{sweep.name}` to stop; its running trials have saved.",
            remedy="Start the same command again and it goes on.",
        )


def make_tuner(setting: TrialSetting, trials: list[Trial], progress: Progress) -> Tuner:
    """Ray Tune over the trials that are missing."""
    sweep, folder = setting.sweep, setting.folder
    population = sweep.scheduler == "pbt"
    search = FolderSearch(
        setting, progress.space, [t.number for t in trials if t.state == "unfinished"]
    )
    resources = population_resources(progress.concurrent) if population else TRIAL_RESOURCES
    return Tuner(
        tune.with_resources(tune.with_parameters(SweepTrial, setting=setting), resources),
        param_space=whole_population(search) if population else None,
        tune_config=TuneConfig(
            num_samples=1 if population else progress.missing,
            search_alg=None if population else search,
            scheduler=make_scheduler(sweep, setting.base, trials),
            # Of a population, those that pause must not count: its slots are those of its resources.
            max_concurrent_trials=None if population else progress.concurrent,
            reuse_actors=False,  # a trial that is stopped would train on until its process gets another
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=TuneRunConfig(
            name="tune",
            storage_path=str(folder / "ray"),
            failure_config=FailureConfig(max_failures=sweep.max_failures),
            # PBT saves where it exchanges. All are kept: one deleted while another trial starts from it would fail that trial.
            checkpoint_config=tune.CheckpointConfig(
                num_to_keep=None, checkpoint_frequency=0, checkpoint_at_end=False
            ),
            callbacks=[progress],
            stop=StopAll(folder / STOP),
            verbose=0,
        ),
    )


def population_resources(concurrent: int) -> dict[str, float]:
    """What each trial of a population holds, so that ``concurrent`` of them run and the others wait.

    PBT pauses a trial that has trained as far as the next exchange while others wait, so all share the slots in turn.
    """
    return {HEAD: math.floor(1e4 / concurrent) / 1e4}  # Ray counts in steps of 1e-4


def whole_population(search: FolderSearch) -> dict[str, Any]:
    """Every trial that is missing, for PBT, which takes no search algorithm: it wants its population at once."""
    found = []
    while isinstance(trial := search.suggest(""), dict):
        found.append(trial)
    by_number = {trial[NUMBER]: trial for trial in found}

    def value_of(key: str) -> Any:
        return tune.sample_from(lambda spec: by_number[spec.config[NUMBER]][key])

    return {NUMBER: tune.grid_search(list(by_number))} | {
        key: value_of(key) for key in search.setting.sweep.search
    }


class FolderSearch(Searcher):  # type: ignore[misc]
    """Trials for Tune: first those of an earlier start that are not over, then new ones."""

    def __init__(self, setting: TrialSetting, space: Space, waiting: list[int]) -> None:
        super().__init__(metric=OBJECTIVE, mode="max")
        self.setting, self.space, self.waiting = setting, space, waiting

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next trial's number and values."""
        folder, sweep = self.setting.folder, self.setting.sweep
        if self.waiting:
            trial = load_trial(folder, self.waiting.pop(0))
            return {NUMBER: trial.number, **trial.values}
        number = next_number(folder)
        known = known_trials(load_trials(folder), sweep.metric_name)
        values: Values | None = suggest(self.space, known, number)
        if values is None:
            return str(Searcher.FINISHED)
        trial = Trial(folder, number, Record(values=values)).save()
        return {NUMBER: trial.number, **trial.values}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Nothing: outcomes are read from the trials' folders."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: the folder has it all."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""


class StopAll(Stopper):  # type: ignore[misc]
    """Stops every trial once the flag is there."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Whether one trial stops: never by this."""
        return False

    def stop_all(self) -> bool:
        """Whether all do."""
        return self.flag.exists()


@contextmanager
def stop_signals(flag: Path) -> Iterator[Callable[[], None]]:
    """Take Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 as the wish to save and stop; the second one ends at once.

    What is ignored already stays so: under nohup a dropped connection stops nothing.

    Yields what takes them again, for Tune puts handlers of its own.
    """
    before = {
        number: handler
        for number in STOP_SIGNALS
        if (handler := signal.getsignal(number)) is not signal.SIG_IGN
    }

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def request(number: int, _frame: FrameType | None) -> None:
        print(
            f"{signal.Signals(number).name}: running trials save, then the sweep ends; once more to end at once",
            flush=True,
        )
        flag.touch()
        restore()

    def take() -> None:
        for number in before:
            signal.signal(number, request)

    take()
    try:
        yield take
    finally:
        restore()


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
        self.started: dict[int, float] = {}
        self.seconds: list[float] = []
        self.said = time.monotonic()

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
        print(
            f"sweep `{sweep.name}`: {self.missing} of {self.space.num_trials} trials to do, {self.concurrent} at a time, "
            f"up to {most_epochs(self.setting.base)} epochs each; tensorboard --logdir {self.setting.folder}",
            flush=True,
        )

    def on_trial_start(
        self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any
    ) -> None:
        """Called by Tune."""
        number = trial.config[NUMBER]
        ours = load_trial(self.setting.folder, number)
        behind = ours.validations()
        going_on = f", going on after epoch {behind[-1].epoch}" if behind else ""
        self.started.setdefault(number, time.monotonic())
        print(f"  trial {ours.name}  {shown(ours.values)}{going_on}", flush=True)

    def on_trial_recover(
        self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any
    ) -> None:
        """Called by Tune where a trial failed and is started again."""
        ours = load_trial(self.setting.folder, trial.config[NUMBER])
        print(f"  trial {ours.name}  failed and is started again: {ours.reason}", flush=True)

    def on_trial_error(
        self, iteration: int, trials: list[RayTrial], trial: RayTrial, **info: Any
    ) -> None:
        """Called by Tune where a trial failed for good."""
        ours = load_trial(self.setting.folder, trial.config[NUMBER])
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
        if time.monotonic() - self.said > STATUS_SECONDS:
            self._status()

    def _over(self, trial: Trial, how: str) -> None:
        self.seconds.append(time.monotonic() - self.started.get(trial.number, time.monotonic()))
        sweep = self.setting.sweep
        best = trial.best(sweep.metric_name)
        if not self.setting.read_test:
            write_hparams(trial)
        value = "" if best is None else f"  {sweep.metric} {best:.4f}"
        print(f"  trial {trial.name}  {how}{value}  ({self.seconds[-1]:.0f} s)", flush=True)
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
        if over:
            left = (self.missing - over) * sum(self.seconds) / over / self.concurrent
            text += f", about {left / 60:.0f} min left"
        print(text, flush=True)
