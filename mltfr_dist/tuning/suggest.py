"""Which values a trial gets: random, grid or TPE. The n-th trial's are a function of (seed, n,
outcomes known by then).

No values are given twice, and none that no run can have.
"""

from __future__ import annotations

import itertools
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import ExperimentalWarning

from mltfr_dist.errors import ConfigError
from mltfr_dist.tuning.domain import Domain
from mltfr_dist.tuning.space import SweepConfig, Values, encoded

STARTUP_TRIALS = 8
"""Outcomes that TPE wants before it models them; until then it draws at random."""


@dataclass(frozen=True)
class Known:
    """A trial that has its values already, and its outcome where there is one."""

    values: Values
    value: float | None
    """The best validation metric; None before the first, or where the trial failed."""


@dataclass
class Space:
    """The points of a sweep.

    Attributes:
        sweep: The sweep.
        base: The base's values of the searched fields, which a field keeps where it does not apply.
        first: What the first trial gets; None: it is drawn as the others are.
        check: Raises ConfigError for values that no run can have.
        left_out: Points that no run can have, met so far, each with the reason.
    """

    sweep: SweepConfig
    base: Values
    first: Values | None
    check: Callable[[Values], None] = lambda values: None
    left_out: dict[str, str] = field(default_factory=dict)

    def can_run(self, values: Values) -> bool:
        """Whether a run can have these values; those it cannot are noted."""
        try:
            self.check(values)
        except ConfigError as error:
            self.left_out[encoded(values)] = error.what
            return False
        return True

    def settled(self, values: Values) -> Values:
        """With the base's value of each field that does not apply."""
        result: Values = {}
        for key, domain in self.sweep.search.items():
            result[key] = values[key] if domain.applies(result) else self.base[key]
        return result

    @cached_property
    def points(self) -> list[Values] | None:
        """Every point that can run, once, the first trial's first; None where there are too many to
        list.
        """
        axes = [domain.options() for domain in self.sweep.search.values()]
        counted = [options for options in axes if options is not None]
        size = math.prod(map(len, counted))
        if len(counted) < len(axes) or (size > MOST_POINTS and self.sweep.algorithm != "grid"):
            return None
        all_points = (dict(zip(self.sweep.search, some)) for some in itertools.product(*counted))
        distinct = {encoded(point): point for point in map(self.settled, all_points)}
        points = [point for point in distinct.values() if self.can_run(point)]
        if self.first is None:
            return points
        return [self.first, *(point for point in points if point != self.first)]

    @property
    def num_trials(self) -> int:
        """Trials of the sweep: those that were asked for, or every point where there are fewer."""
        asked = self.sweep.num_trials
        if self.points is None:
            assert asked is not None, "a space that cannot be listed has num_trials"
            return asked
        return len(self.points) if asked is None else min(asked, len(self.points))


MOST_POINTS = 4096
"""Points of a space that are listed, so that its end is known; a larger one is not used up by a
search.
"""

MOST_DRAWS = 200
"""Draws for one trial before the rest of a space that can be listed is looked through."""


def suggest(space: Space, known: Sequence[Known], number: int) -> Values | None:
    """Values of the next trial; None where the sweep has all its trials.

    Args:
        space: The sweep's points.
        known: All trials so far.
        number: Of the trial, which with the seed makes the draw.

    Raises:
        ConfigError: Of :data:`MOST_DRAWS` draws none could run, in a space that cannot be listed.
    """
    if len(known) >= space.num_trials:
        return None
    taken = {encoded(trial.values) for trial in known}
    if space.first is not None and encoded(space.first) not in taken:
        return space.first
    free = [point for point in space.points or [] if encoded(point) not in taken]
    if space.points is not None and not free:
        return None
    if space.sweep.algorithm == "grid":
        return free[0]
    for values in itertools.islice(draws(space, known, number), MOST_DRAWS):
        if encoded(values) not in taken and space.can_run(values):
            return values
    if free:
        return free[number % len(free)]
    raise ConfigError(
        f"{MOST_DRAWS} draws from the space of the sweep `{space.sweep.name}` gave no values that "
        f"a run can have; the last reason: {list(space.left_out.values())[-1]}",
        rule="A sweep leaves out values that no run can have, and draws again.",
        remedy="Give narrower ranges, or search.KEY.when for fields that exclude each other.",
    )


def draws(space: Space, known: Sequence[Known], number: int) -> Iterator[Values]:
    """Values by Optuna's sampler, which is made anew from the seed and the trial's number: no state
    can be lost.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search = space.sweep.search
    distributions = {key: distribution(domain) for key, domain in search.items()}
    study = optuna.create_study(direction="maximize", sampler=sampler(space.sweep, number))
    for trial in known:
        if trial.value is not None:
            searched = [key for key, domain in search.items() if domain.applies(trial.values)]
            study.add_trial(
                optuna.trial.create_trial(
                    params={key: to_optuna(search[key], trial.values[key]) for key in searched},
                    distributions={key: distributions[key] for key in searched},
                    value=trial.value,
                )
            )
    while True:
        params = study.ask(distributions).params
        yield space.settled({key: from_optuna(search[key], params[key]) for key in search})


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
