"""YAML is read by the rules of YAML 1.2, and written so that it is read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mltfr_dist.config.io import dump_yaml, load_yaml
from mltfr_dist.errors import ConfigError
from mltfr_dist.resolve import resolve_config


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("5E-4", 0.0005),
        ("-1e+2", -100.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("010", 10),
        ("0x1f", 31),
        ("0o17", 15),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("on", "on"),
        ("no", "no"),
        ("yes", "yes"),
        ("2024-05-31", "2024-05-31"),
        ("true", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("[1e-3, 5e-4]", [0.001, 0.0005]),
        ("{a: 1e-3}", {"a": 0.001}),
        ("1e", "1e"),
        ("e3", "e3"),
    ],
)
def test_scalars(text: str, value: Any) -> None:
    result = load_yaml(text)
    assert result == value
    assert type(result) is type(value)


def test_infinities_and_merged_mappings() -> None:
    assert load_yaml("-.inf") == float("-inf")
    assert load_yaml("base: &b {x: 1}\nmore: {<<: *b, y: 2}")["more"] == {"x": 1, "y": 2}


@pytest.mark.parametrize("text", ["a: 1\na: 2", "{a: 1, b: 2, a: 3}", "x:\n  y: 1\n  y: 1\n"])
def test_a_key_that_stands_twice_is_refused(text: str) -> None:
    with pytest.raises(yaml.YAMLError, match="stands twice"):
        load_yaml(text)


def test_a_configuration_with_a_key_twice_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("training:\n  epochs: 3\n  epochs: 30\n")
    with pytest.raises(ConfigError, match=r"`epochs` stands twice(.|\n)*line 3"):
        resolve_config("smoke", path, [])


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@given(st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_what_is_written_is_read_back(value: Any) -> None:
    assert load_yaml(dump_yaml(value)) == value


@pytest.mark.parametrize("text", ["1e-3", "0o17", "on", "1:30", "010", ".5", "2024-05-31", "<<"])
def test_texts_that_look_like_something_else_stay_texts(text: str) -> None:
    assert load_yaml(dump_yaml({"name": text})) == {"name": text}


def test_numbers_with_an_exponent_are_numbers_in_overrides_and_files(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("optimizer:\n  learning_rate: 5e-4\n")
    assert resolve_config("smoke", path, []).optimizer.learning_rate == 5e-4
    override = "optimizer.learning_rate=1e-3"
    assert resolve_config("smoke", path, [override]).optimizer.learning_rate == 1e-3
