"""Search spaces: typed, checked before Ray starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from support import REPOSITORY, tiny_config

from mltfr_dist.errors import ConfigError
from mltfr_dist.schema import validate
from mltfr_dist.training.run_folder import dump_config
from mltfr_dist.tuning.checks import (
    check_folder,
    check_inputs,
    check_machine,
    check_resources,
    check_space,
)
from mltfr_dist.tuning.domain import Domain
from mltfr_dist.tuning.source import base_config, load_sweep
from mltfr_dist.tuning.space import SweepConfig, base_values, shown, typed_choices, with_values
from mltfr_dist.tuning.sweep import claimed, plan_sweep


@pytest.fixture
def base_file(tmp_path: Path) -> Path:
    path = tmp_path / "base.yaml"
    path.write_text(dump_config(tiny_config(tmp_path)))
    return path


def sweep_of(base_file: Path, search: dict[str, Any] | None = None, **changes: Any) -> SweepConfig:
    values = {
        "name": "s",
        "sweeps_dir": str(base_file.parent / "sweeps"),
        "config": str(base_file),
        "search": {"optimizer.learning_rate": {"log_uniform": [1e-4, 1e-2]}}
        if search is None
        else search,
        "num_trials": 4,
        **changes,
    }
    return validate(SweepConfig, values, source="a test")


def test_domains_list_their_values() -> None:
    assert Domain(choices=(1, "a", None)).options() == [1, "a", None]
    assert Domain(integers=(2, 4)).options() == [2, 3, 4]
    assert Domain(subsets=("a", "b"), at_least=1).options() == [["a"], ["b"], ["a", "b"]]
    assert Domain(subsets=("a", "b", "c"), at_least=2).options() == [
        ["a", "b"],
        ["a", "c"],
        ["b", "c"],
        ["a", "b", "c"],
    ]
    assert Domain(uniform=(0.0, 1.0)).options() is None
    assert Domain(uniform=(0.0, 1.0)).holds(0.5)
    assert not Domain(log_uniform=(0.1, 1.0)).holds(0.05)
    assert Domain(subsets=("a", "b")).holds(["b"])
    assert not Domain(subsets=("a", "b")).holds(["c"])
    assert not Domain(uniform=(0.0, 1.0)).holds(None)
    assert Domain(choices=(0, 0.1)).holds(0.0)


@pytest.mark.parametrize(
    ("domain", "message"),
    [
        ({}, "give exactly one of choices, subsets, uniform"),
        ({"choices": [1], "integers": [1, 2]}, "give exactly one of choices, subsets, uniform"),
        ({"uniform": [1.0, 1.0]}, "first end of a range must be below the second"),
        ({"log_uniform": [0.0, 1.0]}, "log_uniform needs ends above 0"),
        ({"subsets": ["a"], "at_least": 2}, "at_least"),
        ({"integers": [0.5, 2]}, "search.optimizer.learning_rate.integers"),
        ({"unform": [0, 1]}, "not a field"),
    ],
)
def test_a_domain_that_is_none_is_refused(
    base_file: Path, domain: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep_of(base_file, {"optimizer.learning_rate": domain})


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"optimizer.lerning_rate": {"uniform": [0.1, 1]}}, "nearest is `optimizer.learning_rate`"),
        ({"filter_ratio": {"uniform": [0.1, 1]}}, "nearest is `mltfr.filter.filter_ratio`"),
        ({"optimizer": {"choices": [1]}}, "`optimizer` is not a field of a run"),
        ({"name": {"choices": ["a"]}}, "`name` cannot be searched"),
        (
            {"published.pick_on_test": {"choices": [False, True]}},
            "`published.pick_on_test` cannot be searched",
        ),
        ({"data.path": {"choices": ["data/a", "data/b"]}}, "`data.path` cannot be searched"),
        ({"mltfr.expert.per_table": {"uniform": [1, 4]}}, "mltfr.expert.per_table"),
        ({"backbone.name": {"uniform": [1, 4]}}, "backbone.name"),
        ({"backbone.name": {"choices": ["sasrec", "sasrek"]}}, "sasrek"),
        ({"backbone.dropout": {"uniform": [0.0, 1.5]}}, "backbone.dropout"),
        ({"training.epochs": {"choices": [True]}}, "epochs must not be true or false"),
        (
            {
                "mltfr.router.top_k": {"choices": [2, 9]},  # valid beside what was meant
                "mltfr.null_expert": {"choices": [True, False]},
            },
            "`mltfr.null_expert` is not a field of a run",
        ),
    ],
)
def test_what_no_trial_can_run_with_is_refused(
    base_file: Path, search: dict[str, Any], message: str
) -> None:
    sweep = sweep_of(base_file, search)
    with pytest.raises(ConfigError, match=message):
        check_space(sweep, base_config(sweep))


def test_values_that_only_go_together_are_accepted(base_file: Path) -> None:
    search = {
        "mltfr.filter.strategy": {"choices": ["user_guided", "seed_words"]},
        "mltfr.filter.seed_words": {"choices": [[], ["first-1"]]},
    }
    sweep = sweep_of(base_file, search)
    check_space(sweep, base_config(sweep))


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("test/NDCG@10", "validation picks|Validation picks"),
        ("valid/NDCG@7", "never reported"),
        ("valid/MAP", "never reported"),
        ("NDCG@10", "Use one of valid/HR@5"),
    ],
)
def test_an_objective_that_trials_do_not_report_is_refused(
    base_file: Path, metric: str, message: str
) -> None:
    sweep = sweep_of(base_file, metric=metric)
    with pytest.raises(ConfigError, match=message):
        check_space(sweep, base_config(sweep))


def test_picking_on_the_test_split_is_refused(base_file: Path) -> None:
    sweep = sweep_of(base_file, overrides={"published.pick_on_test": True})
    with pytest.raises(ConfigError, match="pick_on_test is true"):
        check_space(sweep, base_config(sweep))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "grid", "num_trials": None}, "a grid has no ranges of real numbers"),
        ({"num_trials": None}, "give num_trials"),
        (
            {"algorithm": "grid", "search": {"training.epochs": {"integers": [1, 3]}}},
            "leave num_trials out",
        ),
        ({"search": {}}, "search names no field"),
        (
            {"scheduler": "pbt", "search": {"backbone.num_layers": {"integers": [1, 2]}}},
            "pbt changes fields",
        ),
        ({"resources_per_trial": {"workers": 2, "gpus": 0.5}}, "cannot share a GPU"),
        ({"scheduler": "hyperband"}, "scheduler"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(
    base_file: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep_of(base_file, **changes)


def test_more_than_the_machine_has_is_refused_before_ray(base_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"A trial needs 512 CPUs \(4 workers x 128\)"):
        check_machine(sweep_of(base_file, resources_per_trial={"workers": 4, "cpus": 128}))
    with pytest.raises(ConfigError, match=r"A trial needs 99 GPUs"):
        check_machine(sweep_of(base_file, resources_per_trial={"cpus": 1, "gpus": 99}))
    check_resources(
        sweep_of(base_file, resources_per_trial={"workers": 2, "gpus": 1}), {"CPU": 2, "GPU": 2}
    )


def test_the_base_is_what_trials_share(base_file: Path) -> None:
    sweep = sweep_of(base_file, overrides={"training.epochs": 7}, resources_per_trial={"cpus": 3})
    base = base_config(sweep)
    assert base.training.epochs == 7
    assert base.training.threads == 1, "the file's own"
    assert base.baselines == ()
    assert base.mltfr.placement == "mmap", "a node holds the tables once"
    assert base_values(sweep, base) == {"optimizer.learning_rate": 0.001}
    assert (
        base_values(sweep_of(base_file, {"optimizer.learning_rate": {"choices": [0.5]}}), base)
        is None
    )
    assert with_values(base, {"mltfr.filter.top_k": 8}).mltfr.filter.top_k == 8


def test_a_missing_table_is_refused_before_ray(base_file: Path) -> None:
    sweep = sweep_of(
        base_file,
        {"mltfr.tables": {"subsets": [str(base_file.parent / "tables/first"), "nowhere"]}},
    )
    with pytest.raises(Exception, match="nowhere"):
        check_inputs(sweep, base_config(sweep))


def test_a_folder_of_another_sweep_is_refused(base_file: Path) -> None:
    sweep = sweep_of(base_file)
    base = base_config(sweep)
    with (
        claimed(sweep, base),
        pytest.raises(ConfigError, match="Another process runs"),
        claimed(sweep, base),
    ):
        pass
    more = sweep_of(base_file, num_trials=9, max_concurrent=1, resources_per_trial={"workers": 2})
    check_folder(sweep.folder, more, base)
    other = sweep_of(base_file, {"optimizer.learning_rate": {"log_uniform": [1e-4, 1e-1]}})
    with pytest.raises(
        ConfigError, match=r"search.optimizer.learning_rate.log_uniform is \[0.0001, 0.01\] there"
    ):
        check_folder(sweep.folder, other, base)
    with pytest.raises(ConfigError, match=r"training\.epochs"):
        check_folder(sweep.folder, sweep, with_values(base, {"training.epochs": 50}))
    foreign = sweep_of(base_file, name="foreign")
    foreign.folder.mkdir(parents=True)
    (foreign.folder / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="exists and is not a sweep"):
        check_folder(foreign.folder, foreign, base)


def test_values_are_shown_short() -> None:
    assert (
        shown({"a.tables": ["data/x", "data/y"], "b.rate": 0.00012345, "c.k": None, "d.on": True})
        == "a.tables=x+y  b.rate=0.0001234  c.k=null  d.on=true"
    )


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "tuning" / "spaces").glob("*.yaml")), ids=lambda path: path.stem
)
def test_the_ready_made_spaces_are_valid(path: Path) -> None:
    sweep = load_sweep(path, [])
    base = base_config(sweep)
    check_space(sweep, base)
    assert sweep.name == path.stem
    if sweep.include_base and sweep.scheduler != "pbt":
        assert base_values(sweep, base) is not None, (
            "the base is a point of the space, so that it can be compared with"
        )
    assert load_sweep(path, ["num_trials=3", "asha.grace_epochs=1"]).asha.grace_epochs == 1
    assert yaml.safe_load(path.read_text())["search"]


def test_choices_become_what_their_fields_hold(tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(
        "name: s\npreset: smoke\nnum_trials: 3\nsearch:\n"
        '  optimizer.learning_rate: {choices: [1e-3, "5e-4", 1]}\n'
        "  backbone.num_layers: {choices: ['2', 1]}\n"
        "  mltfr.filter.strategy: {choices: [user_guided]}\n"
    )
    search = load_sweep(path, []).search
    rates = search["optimizer.learning_rate"].choices
    assert rates == (0.001, 0.0005, 1.0)
    assert all(isinstance(rate, float) for rate in rates)
    assert search["backbone.num_layers"].choices == (2, 1)
    assert search["mltfr.filter.strategy"].choices == ("user_guided",)


def test_a_choice_that_is_no_value_of_its_field_is_refused(base_file: Path) -> None:
    sweep = sweep_of(base_file, {"backbone.num_layers": {"choices": ["two"]}})
    with pytest.raises(ConfigError, match=r"backbone\.num_layers.*given: 'two'"):
        check_space(sweep, base_config(sweep))


def test_a_dry_run_lists_what_would_run_and_writes_nothing(base_file: Path) -> None:
    search = {"mltfr.filter.top_k": {"choices": [4, 2, 999]}}
    fixed = {"mltfr.filter.shortlist_size": None}
    sweep = sweep_of(base_file, search, algorithm="grid", num_trials=None, overrides=fixed)
    text = plan_sweep(sweep)
    assert "0 of 2 trials are there" in text
    assert "1 points cannot run and are left out, such as" in text
    assert "keeps 999 tokens" in text
    assert [line.split()[1:] for line in text.splitlines() if line.startswith("  trial")] == [
        ["0000", "filter.top_k=4"],
        ["0001", "filter.top_k=2"],
    ]
    assert not sweep.folder.exists()


NARROWED = {
    "mltfr.enabled": {"choices": [True, False]},
    "mltfr.filter.top_k": {"choices": [2, 4]},
    "training.seed": {"integers": [3, 5]},
}


@pytest.mark.parametrize(
    ("above", "value", "message"),
    [
        ("mltfr.enabled", "maybe", 'wants mltfr.enabled to be "maybe", which it never is'),
        ("mltfr.filter.top_k", [2, 3], "wants mltfr.filter.top_k to be 3"),
        ("training.seed", 6, "wants training.seed to be 6"),
    ],
)
def test_a_condition_that_never_holds_is_refused(
    base_file: Path, above: str, value: Any, message: str
) -> None:
    rate = {"log_uniform": [1e-4, 1e-2], "when": {above: value}}
    sweep = sweep_of(base_file, {**NARROWED, "optimizer.learning_rate": rate})
    with pytest.raises(ConfigError, match=message):
        check_space(sweep, base_config(sweep))


@pytest.mark.parametrize("value", [True, ["false"], 1, "on"])
def test_a_condition_is_read_as_its_field_is(base_file: Path, value: Any) -> None:
    rate = {"choices": ["2e-3"], "when": {"mltfr.enabled": value}}
    search = {"mltfr.enabled": {"choices": ["on", "off"]}, "optimizer.learning_rate": rate}
    sweep = typed_choices(sweep_of(base_file, search))
    check_space(sweep, base_config(sweep))
    on = {"mltfr.enabled": True}
    assert sweep.search["optimizer.learning_rate"].applies(on) is (value != ["false"])


def test_a_field_that_does_not_apply_may_be_asked_for_its_base_value(base_file: Path) -> None:
    search = {
        "mltfr.enabled": {"choices": [True, False]},
        "training.seed": {"choices": [7, 8], "when": {"mltfr.enabled": True}},
        "optimizer.learning_rate": {"choices": [2e-3], "when": {"training.seed": 0}},
    }
    sweep = sweep_of(base_file, search)
    check_space(sweep, base_config(sweep))  # where MLTFR is off, the seed is the base's, 0
