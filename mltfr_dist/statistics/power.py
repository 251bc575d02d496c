"""What a design could have shown: power, smallest detectable difference, equivalence, Holm.

An estimate has a standard error and degrees of freedom, and its tests are Student's t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import optimize, stats

from mltfr_dist.statistics.spread import Spread

ALPHA, POWER = 0.05, 0.8
_FAR = 5.0
MOST_SEEDS = 1000
"""More seeds than this nobody trains."""


def power(difference: float, error: float, freedom: float, alpha: float = ALPHA) -> float:
    """Probability that a two-sided t-test finds a true ``difference`` (Cohen 1988, chapter 2)."""
    if error == 0:
        return 1.0 if difference else alpha
    limit, centre = stats.t.isf(alpha / 2, freedom), abs(difference) / error
    probability = float(stats.nct.sf(limit, freedom, centre))
    if centre < _FAR:  # beyond it the other tail is below 1e-8, and scipy may give NaN for it
        probability += float(stats.nct.cdf(-limit, freedom, centre))
    return probability


def detectable(error: float, freedom: float, alpha: float = ALPHA, wanted: float = POWER) -> float:
    """The smallest true difference that is found with the ``wanted`` power."""
    if error == 0:
        return 0.0
    top = 4.0
    while power(top, 1.0, freedom, alpha) < wanted:
        top *= 2
    solved = optimize.brentq(lambda d: power(d, 1.0, freedom, alpha) - wanted, 0.0, top)
    return error * float(solved)


def seeds_needed(observed: Spread, difference: float, wanted: float = POWER) -> int | None:
    """The fewest seeds that find a true ``difference`` among the same users.

    Returns:
        None where :data:`MOST_SEEDS` do not: the users alone hide it, and only more of them help.

    Raises:
        ValueError: ``observed`` has one seed, and so knows nothing of how seeds differ.
    """
    if observed.num_seeds < 2:
        raise ValueError("one seed says nothing of how seeds differ")

    def enough(seeds: int) -> bool:
        error, freedom = math.sqrt(observed.variance(seeds)), _freedom(observed, seeds)
        return power(difference, error, freedom) >= wanted

    if not difference or not enough(MOST_SEEDS):
        return None
    low, high = 1, MOST_SEEDS  # `low` is too few: one seed has no spread
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _freedom(observed: Spread, seeds: int) -> float:
    """Degrees of freedom that so many seeds would give."""
    users = observed.num_users
    both = observed.both / (users * seeds)
    terms = [(observed.user / users + both, users - 1)]
    if observed.seed > 0:
        terms += [(observed.seed / seeds + both, seeds - 1), (-both, (seeds - 1) * (users - 1))]
    least = math.fsum(term**2 / n for term, n in terms if term)
    return observed.variance(seeds) ** 2 / least if least else users - 1


def difference_p(observed: Spread) -> float:
    """Two-sided p of the t-test that the true difference is 0, over users and seeds."""
    if observed.error == 0:
        return float(observed.mean == 0)
    return float(2 * stats.t.sf(abs(observed.mean) / observed.error, observed.freedom))


def equivalence_p(mean: float, error: float, freedom: float, margin: float) -> float:
    """P of two one-sided tests: that the true difference is not within +-``margin``.

    The larger of the two (Schuirmann 1987). Below alpha, the interval of level 1 - 2 alpha lies
    within the margin, and the two are equivalent by it.
    """
    if error == 0:
        return float(abs(mean) >= margin)
    above = stats.t.sf((mean + margin) / error, freedom)
    below = stats.t.cdf((mean - margin) / error, freedom)
    return float(max(above, below))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number, in the order given (Holm 1979)."""
    number = len(p_values)
    corrected = np.empty(number)
    largest = 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (number - rank) * p_values[index]))
        corrected[index] = largest
    return [float(p) for p in corrected]
