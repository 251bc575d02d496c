"""How far a mean difference over users and seeds can be trusted: its variance, by what causes it.

A difference of user u and seed s is a mean, an effect of the user, one of the seed, and one of both
together; users and seeds are crossed, for every seed meets every user. The mean squares of the
two-way layout give their variances (Searle, Casella and McCulloch 1992, chapter 4), and

    Var(mean) = Var(user) / U + Var(seed) / S + Var(both) / (U S).

Resampling users and seeds each by itself would count the last term three times (McCullagh 2000).
Shapes: S seeds, U users.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from mltfr_dist.statistics.resampling import Floats, bootstrap_means, resampled_deviations


@dataclass(frozen=True)
class Spread:
    """A mean difference, and its variance by cause.

    With one seed the part of seeds is not known and counted as 0: what is said holds for the two
    models that were trained, and not for their configurations.
    """

    mean: float
    num_users: int
    num_seeds: int
    user: float
    """Variance between users, of their means over endlessly many seeds."""
    seed: float
    """Variance between seeds, of their means over endlessly many users."""
    both: float
    """Variance that is left, of a single user at a single seed; with one seed 0, for it is part
    of ``user``."""
    error: float
    """Standard error of the mean."""
    freedom: float
    """Degrees of freedom of the standard error (Satterthwaite 1946)."""

    def variance(self, num_seeds: int, num_users: int | None = None) -> float:
        """Variance of the mean, had there been so many seeds, and users."""
        users = num_users or self.num_users
        return self.user / users + self.seed / num_seeds + self.both / (users * num_seeds)


def spread(differences: Floats) -> Spread:
    """The spread of differences [S, U]; S is 1 or more, U 2 or more."""
    seeds, users = differences.shape
    mean, by_user, by_seed = differences.mean(), differences.mean(0), differences.mean(1)
    user_part = by_user.var(ddof=1) / users
    if seeds == 1:
        of_users = (float(user_part * users), 0.0, 0.0, float(np.sqrt(user_part)), users - 1.0)
        return Spread(float(mean), users, seeds, *of_users)
    seed_part = by_seed.var(ddof=1) / seeds
    rest = differences - by_user - by_seed[:, None] + mean
    both = float((rest**2).sum() / ((seeds - 1) * (users - 1)))
    both_part = both / (seeds * users)
    user, seed = (user_part - both_part) * users, (seed_part - both_part) * seeds
    terms, freedoms = [user_part], [users - 1]
    if seed > 0:
        terms += [seed_part, -both_part]
        freedoms += [seeds - 1, (seeds - 1) * (users - 1)]
    variance = sum(terms)
    least = sum(term**2 / n for term, n in zip(terms, freedoms, strict=True))
    freedom = variance**2 / least if least else users - 1.0
    causes = (max(0.0, float(user)), max(0.0, float(seed)), both)
    return Spread(float(mean), users, seeds, *causes, float(np.sqrt(variance)), float(freedom))


def seeds_alone(values: Floats) -> Spread:
    """The spread of means [S] whose users are not known: all of it is put down to seeds."""
    number, variance = len(values), float(values.var(ddof=1)) if len(values) > 1 else 0.0
    error = float(np.sqrt(variance / number))
    return Spread(float(values.mean()), 1, number, 0.0, variance, 0.0, error, number - 1.0)


def bootstrap_interval(
    differences: Floats, resamples: int, random: np.random.Generator, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap of the mean of differences [S, U], users and seeds together.

    A resample is the mean of resampled users, each with all its seeds, plus what resampled seeds
    add. The seeds' deviations are shrunk to what users by chance cannot explain, and the quantiles
    lie further out by Student's t over the normal one, since few seeds show their spread badly.
    With one seed this is the plain percentile bootstrap over users.
    """
    observed = spread(differences)
    means = bootstrap_means(differences.mean(0), resamples, random)
    by_seed = differences.mean(1)
    if observed.num_seeds > 1 and observed.seed > 0:
        shrunk = np.sqrt(observed.seed / by_seed.var(ddof=1))
        means += shrunk * resampled_deviations(by_seed, resamples, random)
    tail = (1 - level) / 2
    further = stats.t.ppf(tail, observed.freedom) / stats.norm.ppf(tail)
    low, high = np.quantile(means, (tail, 1 - tail)) - observed.mean
    return observed.mean + float(further * low), observed.mean + float(further * high)
