"""Resampling, spread and power against scipy, against known tables, and by their promises."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mltfr_dist.statistics.power import (
    detectable,
    equivalence_p,
    holm,
    power,
    seeds_needed,
)
from mltfr_dist.statistics.resampling import (
    bootstrap_means,
    randomisation_p,
    resampled_deviations,
)
from mltfr_dist.statistics.spread import bootstrap_interval, spread

FEW = np.array([0.3, -0.1, 0.4, 0.2, 0.0, 0.5, -0.3, 0.1, 0.3])


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def metric_like(users: int, seed: int = 0) -> np.ndarray:
    """Differences as of NDCG@10: most are 0, the others take few values."""
    drawn = random(seed)
    values = np.concatenate([np.zeros(20), 1 / np.log2(np.arange(2, 12))])
    return drawn.choice(values, users) - drawn.choice(values, users)


@pytest.mark.parametrize("users", [9, 500])
def test_the_randomisation_test_is_scipys(users: int) -> None:
    values = FEW if users == 9 else metric_like(users)
    result = randomisation_p(values, 40_000, random())
    theirs = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=9_999, rng=random(1)
    )
    p, half = theirs.pvalue, theirs.pvalue / 2  # scipy doubles the smaller tail's
    error = np.sqrt(p * (1 - p) / 40_000)
    if users > 9:  # of nine, scipy goes through all 512 signs
        error += 2 * np.sqrt(half * (1 - half) / 9_999)
    assert result == pytest.approx(p, abs=4 * error)
    assert randomisation_p(-values, 40_000, random()) == result


def test_no_difference_at_all_has_p_1_and_one_of_all_is_never_0() -> None:
    assert randomisation_p(np.zeros(5), 100, random()) == 1
    assert randomisation_p(np.full(500, 0.1), 99, random()) == 1 / 100


@pytest.mark.parametrize("cells", [7, 4_000_000])
def test_the_bootstrap_is_scipys(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mltfr_dist.statistics.resampling._CELLS_AT_ONCE", cells)
    values = metric_like(300)
    means = bootstrap_means(values, 20_000 if cells > 7 else 2_000, random())
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=5_000, method="percentile", rng=random(1), batch=500
    )
    assert means.mean() == pytest.approx(values.mean(), abs=5e-3)
    assert means.std() == pytest.approx(theirs.standard_error, rel=0.06)
    low, high = bootstrap_interval(values[None], 20_000, random())
    assert low == pytest.approx(theirs.confidence_interval.low, rel=0.05)
    assert high == pytest.approx(theirs.confidence_interval.high, rel=0.05)


def test_many_distinct_values_are_drawn_by_their_law(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skew values on purpose; the same quantiles and p as by drawing them one by one."""
    values = random(8).exponential(0.2, 3_000) ** 2 - 0.078
    by_law = bootstrap_means(values, 40_000, random())
    p = randomisation_p(values, 20_000, random())
    monkeypatch.setattr("mltfr_dist.statistics.resampling.MOST_LEVELS", 10_000)
    drawn = bootstrap_means(values, 6_000, random())
    assert randomisation_p(values, 6_000, random()) == pytest.approx(p, abs=0.025)
    for quantile in (0.025, 0.5, 0.975):
        result, expected = np.quantile(by_law, quantile), np.quantile(drawn, quantile)
        assert result == pytest.approx(expected, abs=0.1 * drawn.std())


def test_the_same_seed_gives_the_same_interval() -> None:
    values = metric_like(100).reshape(2, 50)
    first, second = (bootstrap_interval(values, 500, random(3)) for _ in range(2))
    assert first == second != bootstrap_interval(values, 500, random(4))


def test_resampled_seeds_vary_as_their_mean_does() -> None:
    values = np.array([0.1, 0.4, 0.3])
    deviations = resampled_deviations(values, 200_000, random())
    assert deviations.mean() == pytest.approx(0, abs=1e-3)
    assert deviations.var() == pytest.approx(values.var(ddof=1) / 3, rel=0.02)
    assert not resampled_deviations(values[:1], 10, random()).any()


def test_with_one_seed_the_spread_is_that_of_a_t_test() -> None:
    values = metric_like(80)
    result, theirs = spread(values[None]), stats.ttest_1samp(values, 0)
    assert result.mean / result.error == pytest.approx(theirs.statistic)
    assert (result.freedom, result.num_seeds, result.seed) == (79, 1, 0)


def test_variances_by_cause_are_those_of_the_two_way_layout() -> None:
    """Against mean squares summed cell by cell."""
    values = random().normal(size=(4, 7)) + np.arange(4)[:, None] + np.arange(7) / 5
    result, total = spread(values), values.mean()
    users = 4 * sum((values[:, u].mean() - total) ** 2 for u in range(7)) / 6
    seeds = 7 * sum((values[s].mean() - total) ** 2 for s in range(4)) / 3
    rest = sum(
        (values[s, u] - values[s].mean() - values[:, u].mean() + total) ** 2
        for s in range(4)
        for u in range(7)
    ) / (3 * 6)
    assert result.both == pytest.approx(rest)
    assert result.seed == pytest.approx((seeds - rest) / 7)
    assert result.user == pytest.approx(max(0, (users - rest) / 4))
    assert result.error**2 == pytest.approx((users + seeds - rest) / 28)
    assert result.variance(4) == pytest.approx(result.error**2)


@pytest.mark.parametrize(("seeds", "seed_sd"), [(1, 0.0), (3, 0.0), (5, 0.04)])
def test_an_interval_of_95_percent_holds_the_truth_that_often(seeds: int, seed_sd: float) -> None:
    drawn, held = random(5), 0
    for _ in range(150):
        values = 0.3 * drawn.normal(size=100) + drawn.normal(size=(seeds, 100))
        low, high = bootstrap_interval(values + seed_sd * drawn.normal(size=(seeds, 1)), 300, drawn)
        held += low <= 0 <= high
    assert 0.88 < held / 150 <= 1  # four standard errors of the simulation below 0.95


def test_power_by_known_tables() -> None:
    """Cohen 1988, table 2.3; three pairs need 3.26 standard deviations for 80% (statsmodels)."""
    assert detectable(1 / np.sqrt(3), 2) == pytest.approx(3.2640, abs=1e-4)
    assert power(0.5, 1 / np.sqrt(34), 33) == pytest.approx(0.8078, abs=1e-4)
    assert power(0.0, 1.0, 10) == pytest.approx(0.05)
    assert power(2.8, 1.0, 1e6) == pytest.approx(stats.norm.sf(1.959964 - 2.8), abs=1e-4)
    assert power(detectable(0.3, 7), 0.3, 7) == pytest.approx(0.8)


@pytest.mark.parametrize("freedom", [1, 1.3, 2, 5, 60, 1e5])
def test_power_is_the_share_of_simulated_tests_that_find_it(freedom: float) -> None:
    drawn = random(1)
    simulated = (drawn.normal(size=40_000) + 3.5) / np.sqrt(
        drawn.chisquare(freedom, 40_000) / freedom
    )
    result = (np.abs(simulated) > stats.t.isf(0.025, freedom)).mean()
    assert power(-3.5, 1.0, freedom) == pytest.approx(result, abs=0.01)


def test_seeds_needed_is_the_first_number_that_suffices() -> None:
    drawn = random(2)
    values = drawn.normal(size=(4, 400)) + 0.2 * drawn.normal(size=(4, 1))
    values += 0.3 * drawn.normal(size=400)
    result = spread(values)
    assert min(result.user, result.seed) > 0
    few, many = seeds_needed(result, 0.6), seeds_needed(result, 0.15)
    assert few is not None
    assert many is not None
    assert few < many
    assert seeds_needed(result, 1e-4) is None  # the users alone hide it
    with pytest.raises(ValueError, match="one seed"):
        seeds_needed(spread(values[:1]), 0.3)


def test_equivalence_by_two_one_sided_tests() -> None:
    values = metric_like(200) / 10
    result = spread(values[None])
    upper = stats.ttest_1samp(values, 0.01, alternative="less").pvalue
    lower = stats.ttest_1samp(values, -0.01, alternative="greater").pvalue
    p = equivalence_p(result.mean, result.error, result.freedom, 0.01)
    assert p == pytest.approx(max(upper, lower))
    assert equivalence_p(0.0, 0.0, 9, 0.1) == 0
    assert equivalence_p(0.2, 0.0, 9, 0.1) == 1


def test_holm_by_hand() -> None:
    # Ascending .005, .01, .03, .04 times 4, 3, 2, 1; never below the one before.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1, 1]
    assert holm([]) == []
