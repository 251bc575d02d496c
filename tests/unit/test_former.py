"""Configurations of older releases: every field that moved names its new place, and a run goes on
once it is changed.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support import read_lines, tiny_config

from mltfr_dist.config import RunConfig
from mltfr_dist.config.former import INSTEAD, MOVED, moved_to
from mltfr_dist.config.io import dump_yaml, load_yaml
from mltfr_dist.distributed.meeting import stop_ranks
from mltfr_dist.errors import ConfigError
from mltfr_dist.resolve import merge_values, resolve_config
from mltfr_dist.schema import field_paths
from mltfr_dist.training.run_folder import CONFIG, load_config
from mltfr_dist.training.running.fit import fit
from mltfr_dist.tuning.checks import check_space
from mltfr_dist.tuning.space import SweepConfig, nested

AS_BEFORE = {
    "data.train_on": "train",
    "backbone.filter_scope": "prefix",
    "mltfr.filter.query": "prefix",
    "mltfr.consensus.dropout": True,
    "mltfr.train_tables": False,
    "evaluation.select_on": "valid",
    **{path: default for path, (default, _) in MOVED.items()},
}
"""Some of what a complete configuration held before."""


def refused(*overrides: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        resolve_config("demo", None, list(overrides))
    return caught.value


@pytest.mark.parametrize(
    ("path", "value", "now"),
    [(path, value, now) for path, values in INSTEAD.items() for value, now in values.items()],
)
def test_a_defect_names_its_switch(path: str, value: Any, now: str) -> None:
    text = str(value).lower()
    error = refused(f"{path}={text}")
    assert f"`{path}={text}` moved: `{now}`" in error.what
    assert "leave" not in error.what
    assert "config.yaml" in error.remedy
    assert path not in field_paths(RunConfig)
    assert set(moved_to(path)) <= set(field_paths(RunConfig))


@pytest.mark.parametrize("path", MOVED)
def test_a_backbones_own_field_names_its_section(path: str) -> None:
    what = refused(f"{path}=0.4321").what
    assert f"`{path}=0.4321` moved: " in what
    assert all(f"`{place}`" in what for place in MOVED[path][1])
    assert set(MOVED[path][1]) <= set(field_paths(RunConfig))


def test_what_stands_at_its_default_is_to_be_left_out_and_other_errors_are_said_too() -> None:
    what = refused("mltfr.filter.query=prefix", "loss.contrast_group=16", "training.epochs=0").what
    assert "`mltfr.filter.query`, `loss.contrast_group`: no longer there" in what
    assert "leave them out" in what
    assert "`training.epochs`: Input should be greater" in what
    assert "moved" not in what


def test_a_space_names_the_new_place(tmp_path: Path) -> None:
    base = tiny_config(tmp_path)
    for key, place in (
        ("backbone.low_frequencies", "backbone.bsarec.low_frequencies"),
        ("mltfr.filter.memory", "published.pooled_memory"),
    ):
        sweep = SweepConfig(
            name="old", search={key: {"choices": [1, 2]}}, algorithm="grid", scheduler="none"
        )
        with pytest.raises(ConfigError, match=re.escape(f"in its place there is `{place}`")):
            check_space(sweep, base)


def test_a_run_goes_on_once_its_configuration_is_changed(tmp_path: Path) -> None:
    changes = {"training__epochs": 1, "mltfr__consensus__enabled": False}
    config = tiny_config(tmp_path, published__straight_through=True, **changes)
    try:
        (before,) = fit(config)
        stored = load_yaml((config.folder / CONFIG).read_text())
        del stored["published"]
        old = AS_BEFORE | {"mltfr.filter.weights": "straight_through"}
        (config.folder / CONFIG).write_text(dump_yaml(merge_values(stored, nested(old))))
        with pytest.raises(ConfigError) as caught:
            fit(config)
        assert str(config.folder / CONFIG) in caught.value.what
        assert "`mltfr.filter.weights=straight_through` moved: " in caught.value.what
        assert "goes on once its config.yaml is changed so" in caught.value.remedy
        # As the message says.
        changed = merge_values(stored, {"published": {"straight_through": True}})
        (config.folder / CONFIG).write_text(dump_yaml(changed))
        assert load_config(config.folder) == config
        (config.folder / "result.json").unlink()
        (after,) = fit(config)
        assert after.test == before.test
        assert len([x for x in read_lines(config.folder / "metrics.jsonl") if x["kind"] == "test"])
    finally:
        stop_ranks()
