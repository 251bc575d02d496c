"""The n-th trial's values are a function of the seed, n and what is known."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mltfr_dist.errors import ConfigError
from mltfr_dist.schema import validate
from mltfr_dist.tuning.space import SweepConfig, Values
from mltfr_dist.tuning.suggest import Known, Space, suggest

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


BASE: Values = {
    "optimizer.learning_rate": 0.01,
    "mltfr.expert.per_table": 1,
    "mltfr.tables": ["a"],
    "mltfr.consensus.weight": 0.0,
}


def space_of(sweep: SweepConfig, first: Values | None = None, **more: Any) -> Space:
    return Space(sweep, {key: BASE.get(key) for key in sweep.search}, first, **more)


def run(sweep: SweepConfig, count: int, base: Values | None = None) -> list[Values]:
    """Values of the first trials."""
    return run_space(space_of(sweep, base), count)


def run_space(space: Space, count: int) -> list[Values]:
    known: list[Known] = []
    while len(known) < count and (values := suggest(space, known, len(known))) is not None:
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
    assert suggest(space_of(sweep), known, cut) == whole[cut]


def test_tpe_learns() -> None:
    def closest(algorithm: str) -> list[float]:
        result = []
        for seed in range(5):
            late = run(sweep_of(algorithm, seed=seed), 30)[15:]
            result.append(-sum(map(worth, late)) / len(late))
        return result

    assert sum(closest("tpe")) < 0.8 * sum(closest("random"))


def test_a_grid_has_every_combination_once_and_begins_with_the_base() -> None:
    sweep = sweep_of("grid")
    base = {"mltfr.expert.per_table": 2, "mltfr.tables": ["b"], "mltfr.consensus.weight": 0.1}
    points = run(sweep, 99, base)
    assert space_of(sweep, base).num_trials == 3 * 3 * 2 == len(points)
    assert len({str(point) for point in points}) == len(points)
    assert points[0] == base
    assert sorted(map(str, points)) == sorted(map(str, run(sweep, 99)))


def test_the_base_is_the_first_trial_and_failures_are_not_modelled() -> None:
    space = space_of(sweep_of("tpe"), BASE)
    assert suggest(space, [], 0) == BASE
    failed = [Known(BASE, None)] * 3
    others = [Known(BASE, None), *[Known(BASE | {"mltfr.tables": ["b"]}, None)] * 2]
    assert suggest(space, failed, 3) == suggest(space, others, 3)
    assert suggest(space, [Known(BASE, 0.1)] * 30, 30) is None


SMALL: dict[str, Any] = {
    "mltfr.expert.per_table": {"integers": [1, 3]},
    "mltfr.consensus.weight": {"choices": [0.0, 0.1, 0.3]},
}


@pytest.mark.parametrize("algorithm", ["random", "tpe"])
@pytest.mark.parametrize("seed", range(5))
def test_no_values_are_tried_twice_and_a_space_used_up_ends(algorithm: str, seed: int) -> None:
    space = space_of(sweep_of(algorithm, search=SMALL, seed=seed))
    drawn = run_space(space, 99)
    assert space.num_trials == 9 == len(drawn) == len({str(values) for values in drawn})
    assert drawn == run_space(space_of(space.sweep), 99)


def no_weight_with_two(values: Values) -> None:
    if values["mltfr.expert.per_table"] == 2 and values["mltfr.consensus.weight"]:
        raise ConfigError("two and a weight", remedy="none")


@pytest.mark.parametrize("algorithm", ["random", "tpe", "grid"])
def test_what_no_run_can_have_is_left_out_and_counted(algorithm: str) -> None:
    space = space_of(sweep_of(algorithm, search=SMALL), check=no_weight_with_two)
    drawn = run_space(space, 99)
    assert len(drawn) == 7
    for values in drawn:
        no_weight_with_two(values)
    assert len(space.left_out) == 2
    assert set(space.left_out.values()) == {"two and a weight"}


def test_a_range_is_drawn_from_again_where_a_draw_cannot_run() -> None:
    def above(values: Values) -> None:
        if values["optimizer.learning_rate"] < 1e-2:
            raise ConfigError("too slow", remedy="none")

    space = space_of(sweep_of("random"), check=above)
    drawn = run_space(space, 10)
    assert len(drawn) == 10
    assert all(values["optimizer.learning_rate"] >= 1e-2 for values in drawn)
    assert space.left_out


def test_a_space_of_which_nothing_can_run_is_refused() -> None:
    def never(values: Values) -> None:
        raise ConfigError("never", remedy="none")

    with pytest.raises(
        ConfigError, match=r"no values that a run can have.*never.*search\.KEY\.when"
    ):
        suggest(space_of(sweep_of("tpe"), check=never), [], 0)
    assert suggest(space_of(sweep_of("tpe", search=SMALL), check=never), [], 0) is None


WHEN: dict[str, Any] = {
    "mltfr.expert.per_table": {"integers": [1, 3]},
    "mltfr.consensus.weight": {
        "choices": [0.1, 0.3],
        "when": {"mltfr.expert.per_table": [2, 3]},
    },
    "mltfr.tables": {"subsets": ["a", "b"], "when": {"mltfr.consensus.weight": 0.3}},
}


@pytest.mark.parametrize("algorithm", ["random", "tpe", "grid"])
def test_a_field_is_searched_only_when_those_above_it_say_so(algorithm: str) -> None:
    drawn = run_space(space_of(sweep_of(algorithm, search=WHEN)), 99)
    # per_table 1: one point; 2 and 3: weight .1 with the base's table, weight .3 with three choices
    # of tables.
    assert len(drawn) == 1 + 2 * (1 + 3)
    for values in drawn:
        if values["mltfr.expert.per_table"] == 1:
            assert values["mltfr.consensus.weight"] == BASE["mltfr.consensus.weight"]
        if values["mltfr.consensus.weight"] != 0.3:
            assert values["mltfr.tables"] == BASE["mltfr.tables"]


def test_a_condition_must_name_a_field_that_is_searched_above() -> None:
    search = {
        "mltfr.consensus.weight": {"choices": [0.1], "when": {"mltfr.expert.per_table": 1}},
        "mltfr.expert.per_table": {"integers": [1, 3]},
    }
    with pytest.raises(ConfigError, match=r"when names mltfr\.expert\.per_table, which is not"):
        sweep_of("tpe", search=search)
