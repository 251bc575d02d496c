"""Models against a reference, user by user, and what the design could have shown.

A user has one value of a metric, however many targets. Shapes: S seeds, U users, T targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mltfr_dist.errors import ConfigError
from mltfr_dist.metrics import METRICS, is_metric
from mltfr_dist.schema import or_nearest
from mltfr_dist.statistics.power import (
    ALPHA,
    detectable,
    difference_p,
    equivalence_p,
    holm,
    seeds_needed,
)
from mltfr_dist.statistics.resampling import Floats, randomisation_p
from mltfr_dist.statistics.spread import Spread, bootstrap_interval, spread
from mltfr_dist.training.comparing.load import rank_files, read_ranks
from mltfr_dist.training.comparing.models import Model, Models, as_models
from mltfr_dist.training.comparing.slices import user_slices
from mltfr_dist.training.comparing.values import user_values

SHOWN = ("HR@10", "NDCG@10", "MRR")
RESAMPLES = 10_000


@dataclass(frozen=True)
class Options:
    """What is asked of a comparison."""

    metric: str = "NDCG@10"
    """The metric that is tested; of others differences and intervals are told."""
    resamples: int = RESAMPLES
    """Of the bootstrap, and of the randomisation test."""
    seed: int = 0
    """Of the resampling."""
    margin: float | None = None
    """Differences within +-margin count as none; None: equivalence is not tested."""
    difference: float | None = None
    """What the number of seeds is told for; None: the observed difference."""

    def __post_init__(self) -> None:
        name, at, k = self.metric.partition("@")
        fits = is_metric(name) and METRICS[name].at_cutoffs == bool(at)
        if not fits or (at and not (k.isdecimal() and int(k) > 0)):
            known = [f"{name}@10" if m.at_cutoffs else name for name, m in METRICS.items()]
            raise ConfigError(
                f"There is no metric `{self.metric}`{or_nearest(self.metric, known)}.",
                remedy=f"Metrics, at any K: {', '.join(known)}.",
            )
        for option in ("margin", "difference"):
            value = getattr(self, option)
            if value is not None and not 0 < value < 1:
                raise ConfigError(
                    f"The {option} is {value:g}.",
                    rule=f"It is a difference in {self.metric}, between 0 and 1.",
                    remedy=f"Give another --{option}.",
                )
        if self.resamples < 100:
            raise ConfigError(
                f"{self.resamples} resamples are too few for an interval.",
                rule="At least 100; 10000 give p-values to about 0.002.",
                remedy="Give more --resamples.",
            )


@dataclass(frozen=True)
class Change:
    """A difference and its 95% interval over users and seeds."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Slice:
    """The change among some of the targets, as if their users had no others."""

    name: str
    users: int
    reference: float
    model: float
    change: Change
    wins: int
    losses: int


@dataclass(frozen=True)
class Difference:
    """One model against the reference."""

    model: str
    paired_seeds: tuple[tuple[int | None, int | None], ...]
    """Seed of the model and of the reference, as they were paired."""
    changes: dict[str, Change]
    """By metric."""
    p: float
    """The larger p of the randomisation test over users and of the t-test over users and seeds."""
    p_holm: float
    effect: float
    """Mean difference by its standard deviation between users (Cohen's d of paired values)."""
    wins: int
    losses: int
    ties: int
    spread: Spread
    detectable: float
    """The smallest true difference that this design finds with 80% power."""
    seeds_for: float
    """The difference that ``seeds_needed`` is told for."""
    seeds_needed: int | None
    """None: no number of seeds, or, with one seed, not known."""
    equivalence_p: float | None
    """Of two one-sided tests against the margin, corrected as p is; None without a margin."""
    slices: tuple[Slice, ...]


@dataclass(frozen=True)
class Comparison:
    """Models against the first of them."""

    options: Options
    split: str
    num_users: int
    num_targets: int
    protocol: dict[str, str]
    unknown: tuple[str, ...]
    models: tuple[Model, ...]
    means: dict[str, dict[str, float]]
    """By model and metric, over users and seeds."""
    differences: tuple[Difference, ...]

    @property
    def reference(self) -> str:
        """The model that the others are compared with."""
        return self.models[0].label

    def as_json(self) -> dict[str, Any]:
        """Everything but the ranks."""
        values = asdict(replace(self, models=()))
        values["models"] = {
            m.label: {"files": m.files, "seeds": m.seeds, "picked_on": m.picked_on}
            for m in self.models
        }
        return values


def compare_runs(paths: Sequence[str | Path], split: str, options: Options) -> Comparison:
    """Compare runs, matrices and files of ranks with the first model among them.

    Raises:
        MltfrError: What cannot be read or compared.
    """
    files = rank_files(paths)
    compared = as_models([read_ranks(path, split) for path in files])
    if len(compared.models) < 2:
        raise ConfigError(
            f"There is one model to compare, {compared.models[0].label}.",
            rule="The first model is what the others are compared with; runs that differ in "
            "training.seed alone are one model.",
            remedy="Name the run of another model, too.",
        )
    return compare_models(compared, split, options)


def compare_models(compared: Models, split: str, options: Options) -> Comparison:
    """Every model against the first."""
    several = compared.num_users < len(compared.users)
    names = list(dict.fromkeys([options.metric, *SHOWN, *["Recall@10"] * several]))
    reference, *others = compared.models
    differences = [_difference(model, reference, compared, names, options) for model in others]
    corrected = holm([d.p for d in differences])
    differences = [replace(d, p_holm=p) for d, p in zip(differences, corrected, strict=True)]
    if options.margin is not None:
        equal = holm([d.equivalence_p or 0.0 for d in differences])
        differences = [replace(d, equivalence_p=p) for d, p in zip(differences, equal, strict=True)]
    return Comparison(
        options,
        split,
        compared.num_users,
        len(compared.users),
        compared.protocol,
        compared.unknown,
        compared.models,
        {
            m.label: {
                name: float(user_values(m.ranks, name, compared.users).mean()) for name in names
            }
            for m in compared.models
        },
        tuple(differences),
    )


def seed_pairs(model: Model, reference: Model) -> list[tuple[int, int]]:
    """Indices of the seeds that are paired: equal seeds, and a model of one run with all.

    Where none are equal, runs are paired in order, which is as good as any for runs that have
    nothing in common.
    """
    number, other = len(model.seeds), len(reference.seeds)
    if 1 in (number, other):
        return [(i % number, i % other) for i in range(max(number, other))]
    equal = [
        (i, reference.seeds.index(seed))
        for i, seed in enumerate(model.seeds)
        if seed in reference.seeds
    ]
    return equal or [(i, i) for i in range(min(number, other))]


def _difference(
    model: Model,
    reference: Model,
    among: Models,
    names: Sequence[str],
    options: Options,
) -> Difference:
    """One model against the reference; p-values are not yet corrected."""
    random = np.random.default_rng(options.seed)
    pairs = seed_pairs(model, reference)
    own, other = [i for i, _ in pairs], [j for _, j in pairs]

    def values(metric: str, members: Any = slice(None)) -> tuple[Floats, Floats]:
        users = np.unique(among.users[members], return_inverse=True)[1]
        mine, theirs = model.ranks[own][:, members], reference.ranks[other][:, members]
        return user_values(mine, metric, users), user_values(theirs, metric, users)

    def change(of: Floats) -> Change:
        low, high = bootstrap_interval(of, options.resamples, random)
        return Change(float(of.mean()), low, high)

    changes = {name: change(np.subtract(*values(name))) for name in names}
    mine, theirs = values(options.metric)
    paired = mine - theirs  # [S, U]
    by_user = paired.mean(0)
    overall, deviation = spread(paired), float(by_user.std(ddof=1))
    wanted = options.difference or abs(overall.mean)
    slices = [
        _slice(name, *values(options.metric, members), change)
        for name, members in user_slices(among.slicing, among.users)
        if len(np.unique(among.users[members])) > 1
    ]
    p = max(randomisation_p(by_user, options.resamples, random), difference_p(overall))
    margin = options.margin
    return Difference(
        model.label,
        tuple((model.seeds[i], reference.seeds[j]) for i, j in pairs),
        changes,
        p,
        p,
        overall.mean / deviation if deviation else 0.0,
        int((by_user > 0).sum()),
        int((by_user < 0).sum()),
        int((by_user == 0).sum()),
        overall,
        detectable(overall.error, overall.freedom),
        wanted,
        seeds_needed(overall, wanted) if overall.num_seeds > 1 else None,
        None
        if margin is None
        else equivalence_p(overall.mean, overall.error, overall.freedom, margin),
        tuple(slices),
    )


def _slice(name: str, mine: Floats, theirs: Floats, change: Callable[[Floats], Change]) -> Slice:
    """Values [S, U] of the users of a slice, by their targets in it alone."""
    by_user = (mine - theirs).mean(0)
    return Slice(
        name,
        len(by_user),
        float(theirs.mean()),
        float(mine.mean()),
        change(mine - theirs),
        int((by_user > 0).sum()),
        int((by_user < 0).sum()),
    )


def verdict(difference: Difference, options: Options) -> str:
    """What may be said: a difference is shown where the corrected p and the interval agree."""
    change = difference.changes[options.metric]
    shown = difference.p_holm < ALPHA and not change.low <= 0 <= change.high
    word = ("better" if change.difference > 0 else "worse") if shown else "no difference shown"
    p = difference.equivalence_p
    if p is not None and p < ALPHA:
        within = f"within +-{options.margin:g}"
        return f"{word}, but {within}" if shown else f"equivalent {within}"
    return word
