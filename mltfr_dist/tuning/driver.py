"""The sweep's own process: it gives trials to Ray Tune, notes how each ends, and says how far it
is.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray import tune
from ray.tune import FailureConfig, Stopper, TuneConfig, Tuner
from ray.tune import RunConfig as TuneRunConfig
from ray.tune.execution.class_cache import _ActorClassCache
from ray.tune.experiment import Trial as RayTrial
from ray.tune.search import Searcher

from mltfr_dist.config import RunConfig
from mltfr_dist.distributed.signals import (
    asked,
    leave_lost_terminal,
    taken,
    tell,
    unless_again,
)
from mltfr_dist.errors import StoppedError
from mltfr_dist.progress import say
from mltfr_dist.tuning.cluster import Cluster
from mltfr_dist.tuning.early_workers import EarlyGroup, early_groups
from mltfr_dist.tuning.hparams import write_all
from mltfr_dist.tuning.numbering import next_trial
from mltfr_dist.tuning.plan import known_trials, make_space, space_lines
from mltfr_dist.tuning.population import Everyone, population_resources, whole_population
from mltfr_dist.tuning.ray_trial import (
    GENERATION,
    NUMBER,
    OBJECTIVE,
    STOP,
    SweepTrial,
    TrialSetting,
)
from mltfr_dist.tuning.ray_watch import is_full, no_room
from mltfr_dist.tuning.records import Trial, load_trial, load_trials
from mltfr_dist.tuning.schedulers import make_scheduler
from mltfr_dist.tuning.space import SweepConfig
from mltfr_dist.tuning.status import Progress
from mltfr_dist.tuning.suggest import Space
from mltfr_dist.tuning.train_group import per_worker

HEAD = "node:__internal_head__"
"""Ray's resource of which the head node alone has 1."""

TRIAL_RESOURCES = {HEAD: 0.0001}
"""What the process that watches a trial holds: it runs on the head node and takes no CPU from the
workers.

Were it a CPU, as many watchers as there are CPUs could start and wait for workers that have none
left. """

HANDLE_ERROR = RayTrial.handle_error


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
        say(line)
    if not missing:
        return
    (folder / STOP).unlink(missing_ok=True)
    with (
        stop_signals(folder / STOP) as take_signals,
        workers_in_advance(sweep, folder, cluster, missing) as early,
    ):
        setting = TrialSetting(sweep, base, folder, Path.cwd(), read_test, early)
        progress = Progress(setting, space, cluster.concurrent(sweep), missing, take_signals)
        try:
            make_tuner(setting, trials, progress).fit()
        except OSError as error:
            if not is_full(error):
                raise
            raise no_room("what is finished stays.") from None
    if progress.no_room:
        raise no_room("what is finished stays, and no process for the rest can start.")
    if (folder / STOP).exists():
        raise StoppedError(
            f"A signal asked the sweep `{sweep.name}` to stop; its running trials have saved.",
            remedy="Start the same command again and it goes on.",
        )


@contextmanager
def workers_in_advance(
    sweep: SweepConfig, folder: Path, cluster: Cluster, missing: int
) -> Iterator[Sequence[EarlyGroup]]:
    """Workers for the first trials: :mod:`mltfr_dist.tuning.early_workers` says where there are."""
    resources = sweep.resources_per_trial
    if resources.gpus or not cluster.own:
        yield ()
        return
    count = min(missing, cluster.concurrent(sweep))
    each = per_worker(resources)
    with early_groups(each, resources.workers, count, folder / "ray") as groups:
        yield groups


def make_tuner(setting: TrialSetting, trials: list[Trial], progress: Progress) -> Tuner:
    """Ray Tune over the trials that are missing."""
    _ActorClassCache.get, RayTrial.handle_error = in_any_process, note_error
    sweep, folder = setting.sweep, setting.folder
    population = sweep.scheduler == "pbt"
    search = FolderSearch(
        setting, progress.space, [t.number for t in trials if t.state == "unfinished"]
    )
    resources = TRIAL_RESOURCES
    if population:
        resources = population_resources(progress.concurrent, HEAD)
    keys = (GENERATION, *sweep.search)
    return Tuner(
        tune.with_resources(tune.with_parameters(SweepTrial, setting=setting), resources),
        param_space=whole_population(lambda: search.suggest(""), keys) if population else None,
        tune_config=TuneConfig(
            num_samples=1 if population else progress.missing,
            search_alg=Everyone() if population else search,
            scheduler=make_scheduler(sweep, setting.base, trials),
            # Of a population, those that pause must not count: its slots are those of its
            # resources.
            max_concurrent_trials=None if population else progress.concurrent,
            reuse_actors=True,  # a watcher takes the next trial and need not start
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=TuneRunConfig(
            name="tune",
            storage_path=str(folder / "ray"),
            failure_config=FailureConfig(max_failures=sweep.max_failures),
            # PBT saves where it exchanges; what it saves says where a snapshot lies.
            checkpoint_config=tune.CheckpointConfig(
                num_to_keep=None, checkpoint_frequency=0, checkpoint_at_end=False
            ),
            callbacks=[progress],
            stop=StopAll(folder / STOP),
            verbose=0,
        ),
    )


def given(trial: Trial) -> dict[str, Any]:
    """A trial as Tune has it."""
    return {NUMBER: trial.number, GENERATION: trial.record.generation, **trial.values}


def in_any_process(_cache: Any, trainable: type) -> Any:
    """A trainable as Ray's actor. Tune gives it an environment of its own, and so those that it
    starts: Ray's processes that wait since its start would be of no use to any of them.
    """
    return ray.remote(trainable)


def note_error(trial: RayTrial, error: Exception | None = None) -> None:
    """Tune's count of a trial's failures, also where no room is left for its own note of them."""
    try:
        HANDLE_ERROR(trial, error)
    except OSError as full:
        if not is_full(full):
            raise


class FolderSearch(Searcher):  # type: ignore[misc]
    """Trials for Tune: first those of an earlier start that are not over, then new ones."""

    def __init__(self, setting: TrialSetting, space: Space, waiting: list[int]) -> None:
        super().__init__(metric=OBJECTIVE, mode="max")
        self.setting, self.space, self.waiting = setting, space, waiting

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """The next trial's number and values."""
        folder, sweep = self.setting.folder, self.setting.sweep
        if (folder / STOP).exists():
            return str(Searcher.FINISHED)
        if self.waiting:
            return given(load_trial(folder, self.waiting.pop(0)))
        coming = next_trial(
            self.space, folder, known_trials(load_trials(folder), sweep.metric_name)
        )
        if coming is None:
            return str(Searcher.FINISHED)
        if coming.was_deleted:
            say(f"  trial {coming.number:04d}  was deleted and is run again")
        return given(Trial(folder, coming.number, coming.record).save())

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
    """Take the stop signals as the wish to save and stop; a second Ctrl-C ends at once.

    Yields what takes them again, for Tune puts handlers of its own.
    """
    before = taken()

    def request(number: int, _frame: FrameType | None) -> None:
        leave_lost_terminal()
        if not flag.exists():
            tell(f"{asked(number)}: running trials save, then the sweep ends{unless_again(number)}")
            flag.touch()
        if number == signal.SIGINT:
            signal.signal(number, before[number])

    def take() -> None:
        for number in before:
            signal.signal(number, request)

    take()
    try:
        yield take
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
