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
    TrialScheduler,
)

from mltfr_dist.config import RunConfig
from mltfr_dist.tuning.population import Population
from mltfr_dist.tuning.ray_trial import EPOCH, NUMBER, OBJECTIVE
from mltfr_dist.tuning.records import Trial
from mltfr_dist.tuning.space import SweepConfig, base_values
from mltfr_dist.tuning.turns import most_epochs


def make_scheduler(sweep: SweepConfig, base: RunConfig, trials: Sequence[Trial]) -> TrialScheduler:
    """The scheduler, told what ``trials`` of an earlier start of the sweep have shown."""
    if sweep.scheduler == "asha":
        base_first = sweep.include_base and base_values(sweep, base) is not None
        return Asha(sweep, most_epochs(base), trials, base_first=base_first)
    if sweep.scheduler == "pbt":
        return Population(sweep, base, trials)
    return FIFOScheduler()


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
