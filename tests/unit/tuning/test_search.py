"""The n-th trial's values are a function of the seed, n and what is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mltfr_dist.schema import validate
from mltfr_dist.tuning.search import Known, suggest
from mltfr_dist.tuning.space import SweepConfig, Values

SEARCH: dict[str, Any] = {
    "optimizer.learning_rate": {"log_uniform": [1e-4, 1e-1]},
    "mltfr.expert.per_table": {"integers": [1, 3]},
    "mltfr.tables": {"subsets": ["a", "b"]},
    "mltfr.consensus.weight": {"choices": [0.0, 0.1]},
}


def sweep_of(algorithm: str, **changes: Any) -> SweepConfig:
    search = {k: v for k, v in SEARCH.items() if algorithm != "grid" or "learning" not in k}
    values = {"name": "s", "search": search, "algorithm": algorithm, "num_trials": 30, **changes}
    if algorithm == "grid":
        values["num_trials"] = None
    return validate(SweepConfig, values, source="a test")


def worth(values: Values) -> float:
    """More, the closer the learning rate is to 0.01."""
    return -abs(math.log10(values.get("optimizer.learning_rate", 1.0) / 0.01))


def run(sweep: SweepConfig, count: int, base: Values | None = None) -> list[Values]:
    """Values of the first trials."""
    known: list[Known] = []
    while len(known) < count and (values := suggest(sweep, known, base)) is not None:
        known.append(Known(values, worth(values)))
    return [trial.values for trial in known]


@pytest.mark.parametrize("algorithm", ["random", "tpe"])
def test_drawn_values_lie_in_the_space_and_repeat_by_seed(algorithm: str) -> None:
    sweep = sweep_of(algorithm)
    drawn = run(sweep, 20)
    assert all(sweep.search[key].holds(value) for values in drawn for key, value in values.items())
    assert len({str(values) for values in drawn}) > 15
    assert drawn == run(sweep, 20)
    assert drawn != run(sweep_of(algorithm, seed=1), 20)
    assert {len(values["mltfr.tables"]) for values in drawn} == {1, 2}


@settings(max_examples=10, deadline=None)
@given(cut=st.integers(1, 14))
def test_a_sweep_that_is_gone_on_with_draws_what_it_would_have(cut: int) -> None:
    sweep = sweep_of("tpe")
    whole = run(sweep, 15)
    known = [Known(values, worth(values)) for values in whole[:cut]]
    assert suggest(sweep, known, None) == whole[cut]


def test_tpe_learns() -> None:
    def closest(algorithm: str) -> list[float]:
        found = []
        for seed in range(5):
            late = run(sweep_of(algorithm, seed=seed), 30)[15:]
            found.append(-sum(map(worth, late)) / len(late))
        return found

    assert sum(closest("tpe")) < 0.8 * sum(closest("random"))


def test_a_grid_has_every_combination_once_and_begins_with_the_base() -> None:
    sweep = sweep_of("grid")
    base = {"mltfr.expert.per_table": 2, "mltfr.tables": ["b"], "mltfr.consensus.weight": 0.1}
    points = run(sweep, 99, base)
    assert sweep.trials() == 3 * 3 * 2 == len(points)
    assert len({str(point) for point in points}) == len(points)
    assert points[0] == base
    assert sorted(map(str, points)) == sorted(map(str, run(sweep, 99)))


def test_the_base_is_the_first_trial_and_failures_are_not_modelled() -> None:
    base = {
        "optimizer.learning_rate": 0.01,
        "mltfr.expert.per_table": 1,
        "mltfr.tables": ["a"],
        "mltfr.consensus.weight": 0.0,
    }
    sweep = sweep_of("tpe")
    assert suggest(sweep, [], base) == base
    failed = [Known(base, None)] * 3
    assert suggest(sweep, failed, base) == suggest(
        sweep, [Known(base | {"mltfr.tables": ["b"]}, None)] * 3, base
    )
    assert suggest(sweep, [Known(base, 0.1)] * 30, base) is None
