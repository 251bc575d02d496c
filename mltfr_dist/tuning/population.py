"""Population-based training in turns: all trials of a population are compared after the same
epochs.

Tune's own comparison takes each trial as it comes. Where fewer run at a time than there are, those
that come first in a round have trained longer than all others, and look better for that alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ray import tune
from ray.tune.experiment import Trial as RayTrial
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from mltfr_dist.config import RunConfig
from mltfr_dist.progress import say
from mltfr_dist.tuning.domain import Domain
from mltfr_dist.tuning.ray_trial import EPOCH, GENERATION, NUMBER, OBJECTIVE
from mltfr_dist.tuning.records import Trial
from mltfr_dist.tuning.space import SweepConfig
from mltfr_dist.tuning.turns import Turns


def mutation(domain: Domain) -> Any:
    """A domain as PBT takes it: a list of values, or a distribution."""
    if domain.log_uniform:
        return tune.loguniform(*domain.log_uniform)
    return tune.uniform(*domain.uniform) if domain.uniform else domain.options()


class Population(PopulationBasedTraining):  # type: ignore[misc]
    """PBT that waits for all, whose trials keep their own numbers, and whose values stay in the
    space.

    A trial pauses at the end of its turn (:class:`~mltfr_dist.tuning.turns.Turns`). Once all that
    are not over have paused, those in the lower quantile take over weights and values of those in
    the upper one. What is drawn then is a function of the seed and the epoch.
    """

    def __init__(self, sweep: SweepConfig, base: RunConfig, trials: Sequence[Trial]) -> None:
        """Args: trials: of an earlier start, which say what the next exchange is."""
        super().__init__(
            time_attr=EPOCH,
            metric=OBJECTIVE,
            mode="max",
            perturbation_interval=sweep.pbt.every_epochs,
            quantile_fraction=sweep.pbt.quantile,
            hyperparam_mutations={key: mutation(domain) for key, domain in sweep.search.items()},
            log_config=False,
            synch=True,
        )
        self._sweep, self._turns = sweep, Turns.of(sweep, base)
        behind = [t.validations()[-1:] for t in trials if t.state == "unfinished"]
        self._due = self._turns.end_at(max((v[0].epoch for v in behind if v), default=0))
        self._takes: list[str] = []

    def on_trial_add(self, tune_controller: Any, trial: RayTrial) -> None:
        """Called by Tune for a new trial: a process that watched one waits for the next, though
        none may be due before all have paused.
        """
        super().on_trial_add(tune_controller, trial)
        cache = tune_controller._tune_controller._actor_cache
        cache.increase_max(trial.placement_group_factory)

    def on_trial_result(self, tune_controller: Any, trial: RayTrial, result: dict[str, Any]) -> str:
        """Called by Tune for each validation: a trial pauses at the exchange."""
        if self._due is None or result[EPOCH] < self._due:
            return str(TrialScheduler.CONTINUE)
        self._save_trial_state(self._trial_state[trial], result[EPOCH], result, trial)
        return str(TrialScheduler.PAUSE)

    def choose_trial_to_run(self, tune_controller: Any) -> RayTrial | None:
        """Called by Tune all the time: the trial that has trained least, exchanges being done
        first.
        """
        live = [trial for trial in tune_controller.get_trials() if not trial.is_finished()]
        if live and all(self._waits(trial) for trial in live):
            self._exchange(tune_controller, len(live))
        able = [
            trial
            for trial in live
            if trial.status in (RayTrial.PENDING, RayTrial.PAUSED) and not self._waits(trial)
        ]
        return min(able, key=lambda t: self._trial_state[t].last_train_time, default=None)

    def _waits(self, trial: RayTrial) -> bool:
        reached = self._due is not None and self._trial_state[trial].last_train_time >= self._due
        return reached and trial.status == RayTrial.PAUSED

    def _exchange(self, tune_controller: Any, size: int) -> None:
        random.seed(f"{self._sweep.seed} {self._due}")
        np.random.seed(random.getrandbits(32))  # Tune draws from both
        lower, upper = self._quantiles()
        self._takes = []
        for trial in (*upper, *lower):
            self._checkpoint_or_exploit(trial, tune_controller, upper, lower)
        taken = "; ".join(self._takes) or "none takes over another's weights"
        say(f"  epoch {self._due}, all {size} trials compared: {taken}")
        behind = max(state.last_train_time for state in self._trial_state.values())
        self._due = self._turns.end_after(behind)

    def _exploit(self, tune_controller: Any, trial: RayTrial, trial_to_clone: RayTrial) -> None:
        super()._exploit(tune_controller, trial, trial_to_clone)
        self._takes.append(
            f"{trial.config[NUMBER]:04d} goes on from {trial_to_clone.config[NUMBER]:04d}"
        )

    def _get_new_config(
        self, trial: RayTrial, trial_to_clone: RayTrial
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Tune's values for a trial that goes on from another's weights; Tune copies the other's
        number as well.
        """
        config, operations = super()._get_new_config(trial, trial_to_clone)
        config[NUMBER], config[GENERATION] = trial.config[NUMBER], trial.config[GENERATION] + 1
        for key, domain in self._sweep.search.items():
            if domain.ends:  # Tune steps by factors, beyond the ends of a range too
                config[key] = min(max(config[key], domain.ends[0]), domain.ends[1])
        return config, operations


class Everyone(BasicVariantGenerator):  # type: ignore[misc]
    """Gives Tune a whole population, and says that more may come until all are over: else Tune ends
    the process of a trial that pauses while none waits for it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._given: list[RayTrial] = []

    def next_trial(self) -> RayTrial | None:
        """The next trial of the population."""
        trial = super().next_trial()
        self._given += [] if trial is None else [trial]
        return trial

    def is_finished(self) -> bool:
        """Whether no trial needs a process any more."""
        return bool(super().is_finished()) and all(t.is_finished() for t in self._given)


def whole_population(suggest: Callable[[], Any], keys: Sequence[str]) -> dict[str, Any]:
    """Every trial that is missing, for PBT, which takes no search algorithm: it wants its
    population at once.

    Args:
        suggest: Gives one trial after the other, and at the end what is no dictionary.
        keys: Of each.
    """
    members = []
    while isinstance(trial := suggest(), dict):
        members.append(trial)
    by_number = {trial[NUMBER]: trial for trial in members}

    def value_of(key: str) -> Any:
        return tune.sample_from(lambda spec: by_number[spec.config[NUMBER]][key])

    return {NUMBER: tune.grid_search(list(by_number))} | {key: value_of(key) for key in keys}


def population_resources(concurrent: int, node: str) -> dict[str, float]:
    """What each trial of a population holds of its ``node``, so that ``concurrent`` of them run and
    the others wait.
    """
    return {node: math.floor(1e4 / concurrent) / 1e4}  # Ray counts in steps of 1e-4
