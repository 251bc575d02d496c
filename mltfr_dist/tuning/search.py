"""Which values a trial gets: random, grid or TPE. The n-th trial's are a function of (seed, n, outcomes known by then)."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import ExperimentalWarning

from mltfr_dist.tuning.space import Domain, SweepConfig, Values, encoded

STARTUP_TRIALS = 8
"""Outcomes that TPE wants before it models them; until then it draws at random."""


@dataclass(frozen=True)
class Known:
    """A trial that has its values already, and its outcome where there is one."""

    values: Values
    value: float | None
    """The best validation metric; None before the first, or where the trial failed."""


def suggest(sweep: SweepConfig, known: Sequence[Known], base: Values | None) -> Values | None:
    """Values of the next trial; None where the sweep has all its trials.

    Args:
        sweep: The sweep.
        known: All trials so far, in order.
        base: What the first trial gets; None: it is drawn as the others are.
    """
    number = len(known)
    if number >= sweep.trials():
        return None
    if sweep.algorithm == "grid":
        return grid(sweep, base)[number]
    return base if base is not None and number == 0 else drawn(sweep, known)


def grid(sweep: SweepConfig, base: Values | None) -> list[Values]:
    """Every combination, the base first."""
    axes = [domain.options() or [] for domain in sweep.search.values()]
    points = [dict(zip(sweep.search, some)) for some in itertools.product(*axes)]
    return points if base is None else [base, *(point for point in points if point != base)]


def drawn(sweep: SweepConfig, known: Sequence[Known]) -> Values:
    """Values by Optuna's sampler, which is made anew from the seed and the number of the trial: there is no state to lose."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {key: distribution(domain) for key, domain in sweep.search.items()}
    study = optuna.create_study(direction="maximize", sampler=sampler(sweep, len(known)))
    for trial in known:
        if trial.value is not None:
            params = {key: to_optuna(sweep.search[key], trial.values[key]) for key in sweep.search}
            study.add_trial(
                optuna.trial.create_trial(
                    params=params, distributions=distributions, value=trial.value
                )
            )
    params = study.ask(distributions).params
    return {key: from_optuna(sweep.search[key], params[key]) for key in sweep.search}


def sampler(sweep: SweepConfig, number: int) -> optuna.samplers.BaseSampler:
    """The sampler of trial ``number``."""
    seed = (sweep.seed * 1_000_003 + number) % 2**32
    if sweep.algorithm == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # multivariate, in Optuna since 2.2
        return optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=STARTUP_TRIALS, multivariate=True, constant_liar=True
        )


def distribution(domain: Domain) -> BaseDistribution:
    """The domain for Optuna; choices as text, for lists cannot be its categories."""
    if domain.integers:
        return IntDistribution(*domain.integers)
    if domain.ends:
        return FloatDistribution(*domain.ends, log=domain.log_uniform is not None)
    return CategoricalDistribution([encoded(option) for option in domain.options() or []])


def to_optuna(domain: Domain, value: Any) -> Any:
    """A value as :func:`distribution` holds it."""
    return encoded(value) if domain.ends is None else value


def from_optuna(domain: Domain, value: Any) -> Any:
    """The inverse of :func:`to_optuna`."""
    return json.loads(value) if domain.ends is None else value
