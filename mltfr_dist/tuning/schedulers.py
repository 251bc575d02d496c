"""Which trials go on: asynchronous successive halving and population-based training, as Ray Tune
has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)

from mltfr_dist.config import RunConfig
from mltfr_dist.tuning.domain import Domain
from mltfr_dist.tuning.ray_trial import EPOCH, NUMBER, OBJECTIVE
from mltfr_dist.tuning.records import Trial
from mltfr_dist.tuning.space import SweepConfig, base_values


def most_epochs(base: RunConfig) -> int:
    """Epochs of a trial that nothing stops, over both stages."""
    second = base.mltfr.enabled and base.mltfr.consensus.enabled
    return base.training.epochs + (base.training.consensus_epochs if second else 0)


def make_scheduler(sweep: SweepConfig, base: RunConfig, trials: Sequence[Trial]) -> TrialScheduler:
    """The scheduler, told what ``trials`` of an earlier start of the sweep have shown."""
    if sweep.scheduler == "asha":
        base_first = sweep.include_base and base_values(sweep, base) is not None
        return Asha(sweep, most_epochs(base), trials, base_first=base_first)
    if sweep.scheduler == "pbt":
        return Population(sweep)
    return FIFOScheduler()


def mutation(domain: Domain) -> Any:
    """A domain as PBT takes it: a list of values, or a distribution."""
    from ray import tune

    if domain.log_uniform:
        return tune.loguniform(*domain.log_uniform)
    return tune.uniform(*domain.uniform) if domain.uniform else domain.options()


class Population(PopulationBasedTraining):  # type: ignore[misc]
    """PBT whose trials keep their own numbers, and whose values stay in the space."""

    def __init__(self, sweep: SweepConfig) -> None:
        super().__init__(
            time_attr=EPOCH,
            metric=OBJECTIVE,
            mode="max",
            perturbation_interval=sweep.pbt.every_epochs,
            quantile_fraction=sweep.pbt.quantile,
            hyperparam_mutations={key: mutation(domain) for key, domain in sweep.search.items()},
            log_config=False,
        )
        self._search = dict(sweep.search)

    def _get_new_config(
        self, trial: Any, trial_to_clone: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Tune's values for a trial that goes on from another's weights; Tune copies the other's
        number as well.
        """
        config, operations = super()._get_new_config(trial, trial_to_clone)
        config[NUMBER] = trial.config[NUMBER]
        for key, domain in self._search.items():
            if domain.ends:  # Tune steps by factors, beyond the ends of a range too
                config[key] = min(max(config[key], domain.ends[0]), domain.ends[1])
        return config, operations


class Asha(AsyncHyperBandScheduler):  # type: ignore[misc]
    """ASHA that remembers across starts: Tune keeps trials and forgets what its scheduler has seen
    of them.

    A trial's own validations are entered again when it is added; those that will not run again at
    the beginning. Decisions were taken then, so those of the repetition are ignored. The base is
    never stopped: what the others must beat shall have had its full time.
    """

    def __init__(
        self, sweep: SweepConfig, max_epochs: int, trials: Sequence[Trial], *, base_first: bool
    ) -> None:
        super().__init__(
            time_attr=EPOCH,
            metric=OBJECTIVE,
            mode="max",
            max_t=max(max_epochs, sweep.asha.grace_epochs + 1),
            grace_period=sweep.asha.grace_epochs,
            reduction_factor=sweep.asha.reduction_factor,
            stop_last_trials=False,
        )
        self._metric_name = sweep.metric_name
        self._trials = {trial.number: trial for trial in trials}
        self._never_stopped = 0 if base_first else None
        for trial in trials:
            if trial.state != "unfinished":
                known = SimpleNamespace(
                    trial_id=f"earlier-{trial.number}", config={NUMBER: trial.number}
                )
                self.on_trial_add(None, known)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Called by Tune for each validation."""
        decision = str(super().on_trial_result(tune_controller, trial, result))
        return (
            str(TrialScheduler.CONTINUE)
            if trial.config[NUMBER] == self._never_stopped
            else decision
        )

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Called by Tune for a new trial."""
        super().on_trial_add(tune_controller, trial)
        earlier = self._trials.get(trial.config[NUMBER])
        best = 0.0
        for validation in earlier.validations() if earlier else ():
            best = max(best, validation.metrics[self._metric_name])
            self.on_trial_result(tune_controller, trial, {EPOCH: validation.epoch, OBJECTIVE: best})
