"""Resampling of paired differences: bootstrap of a mean, and the randomisation test.

Metrics of single users take few values (NDCG@10 of one target eleven), so users of equal value are
drawn together: as many of each as a multinomial or binomial draw says, which is the same law as
drawing users one by one. Of more than :data:`MOST_LEVELS` distinct values, and so of more users,
the law itself is drawn from: normal, with its skewness, from which the true one differs by the
order of 1 / U, less than from 10,000 draws. Shapes: U users, K distinct values, R resamples, S
seeds.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MOST_LEVELS = 2_000
"""Distinct values that are drawn one by one."""

_CELLS_AT_ONCE = 4_000_000
"""Drawn numbers that are held at a time: 32 MB."""

_EQUAL = 1e-12
"""Relative difference up to which two sums of the same numbers are equal."""


def bootstrap_means(values: Floats, resamples: int, random: np.random.Generator) -> Floats:
    """Means [R] of samples drawn with replacement from ``values`` [U], each of U (Efron 1979)."""
    levels, counts = np.unique(values, return_counts=True)
    if len(levels) > MOST_LEVELS:
        return _expanded(values, random.standard_normal(resamples))
    order = np.argsort(
        -counts, kind="stable"
    )  # the commonest first: what is left to draw is little
    levels, counts = levels[order], counts[order]
    shares = counts / len(values)
    means = [
        random.multinomial(len(values), shares, n) @ levels for n in _chunks(resamples, levels)
    ]
    return np.concatenate(means) / len(values)


def randomisation_p(values: Floats, resamples: int, random: np.random.Generator) -> float:
    """Two-sided p of a paired randomisation test of mean 0: the sign of each value is a coin's.

    Under the hypothesis that two models are one, which of them a user's two results came from is
    chance (Fisher 1935; Smucker, Allan and Carterette 2007). The observed signs count as one of the
    draws, so that p is never 0 and the test keeps its level.

    Args:
        values: [U] a difference of each user.
        resamples: R.
        random: What draws.
    """
    sizes, counts = np.unique(np.abs(values[values != 0]), return_counts=True)
    observed = abs(float(values.sum()))
    least = observed * (1 - _EQUAL)
    if len(sizes) > MOST_LEVELS:
        drawn = np.sqrt(float(counts @ sizes**2)) * random.standard_normal(resamples)
        return (1 + int((np.abs(drawn) >= least).sum())) / (1 + resamples)
    reached = 0
    for n in _chunks(resamples, sizes):
        positive = random.binomial(counts, 0.5, (n, len(sizes)))
        reached += int((np.abs((2 * positive - counts) @ sizes) >= least).sum())
    return (1 + reached) / (1 + resamples)


def resampled_deviations(values: Floats, resamples: int, random: np.random.Generator) -> Floats:
    """Deviations [R] of the mean of ``values`` [S], few as they are.

    S - 1 of them are drawn at a time: of S, their means would vary too little, by the factor
    (S - 1) / S (Rao and Wu 1988). Zeros where S is 1.
    """
    number = len(values)
    if number < 2:
        return np.zeros(resamples)
    drawn = random.integers(0, number, (resamples, number - 1))
    return np.asarray(values[drawn].mean(1) - values.mean())


def _expanded(values: Floats, normal: Floats) -> Floats:
    """Means of resamples by the Cornish-Fisher expansion of their law (Hall 1992, section 2.5)."""
    mean, deviation = values.mean(), values.std()
    skewness = float((((values - mean) / deviation) ** 3).mean())
    root = np.sqrt(len(values))
    return np.asarray(mean + deviation / root * (normal + skewness / (6 * root) * (normal**2 - 1)))


def _chunks(resamples: int, levels: Floats) -> Iterator[int]:
    """Numbers of resamples that are drawn together."""
    most = max(1, _CELLS_AT_ONCE // max(1, len(levels)))
    for start in range(0, resamples, most):
        yield min(most, resamples - start)
