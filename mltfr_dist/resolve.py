"""A configuration from its three sources: preset, file, overrides; each over the one before."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from mltfr_dist.config import RunConfig
from mltfr_dist.config.io import load_yaml
from mltfr_dist.errors import ConfigError
from mltfr_dist.presets import PRESETS, preset
from mltfr_dist.schema import nested, validate
from mltfr_dist.training.origin import ORIGIN, check_located, located
from mltfr_dist.training.run_folder import CONFIG, read_yaml


def resolve_config(
    preset_name: str | None, file: str | Path | None, overrides: Sequence[str]
) -> RunConfig:
    """Preset, then file, then overrides, each over the one before.

    Raises:
        ConfigError: Nothing given, an override without `=`, or a configuration that is not valid.
        DataError: The file is a run's, and what it reads is not found.
    """
    if preset_name is None and file is None:
        raise ConfigError(
            "No configuration is given.",
            remedy=f"Use --preset ({', '.join(PRESETS)}) or --config FILE.",
        )
    values: dict[str, Any] = preset(preset_name).model_dump(mode="json") if preset_name else {}
    sources = [f"preset `{preset_name}`"] if preset_name else []
    if file is not None:
        values = merge_values(values, read_configuration(Path(file)))
        sources.append(str(file))
    for override in overrides:
        values = merge_values(values, parse_override(override))
        sources.append(f"`{override}`")
    config = validate(RunConfig, values, source=", ".join(sources))
    if file is not None:
        check_located(config.model_dump(mode="json"), Path(file).parent)
    return config


def read_configuration(file: Path) -> dict[str, Any]:
    """A file's values; of one in a run's or sweep's folder, its inputs as they are found from the
    working folder.

    A run's own file stands for that run, wherever its folder now lies.

    Raises:
        ConfigError: It cannot be read.
    """
    values, folder = read_yaml(file), file.parent
    if not (folder / ORIGIN).exists():
        return values
    configuration = located(values, folder) | {"runs_dir": values.get("runs_dir", "runs")}
    if file.name == CONFIG and not _lies_in(folder, configuration):
        configuration |= {"runs_dir": str(folder.resolve().parent), "name": folder.resolve().name}
    return configuration


def _lies_in(folder: Path, values: dict[str, Any]) -> bool:
    chosen = Path(str(values["runs_dir"])) / str(values.get("name", "run"))
    return os.path.realpath(chosen) == os.path.realpath(folder)


def merge_values(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """``over`` laid on ``under``, mapping by mapping."""
    merged = dict(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge_values(merged[key], value) if both else value
    return merged


def parse_override(text: str) -> dict[str, Any]:
    """`a.b=value` (value as in YAML) to a nested mapping."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(
            f"The override `{text}` is not understood.",
            rule="An override is KEY=VALUE.",
            remedy="Add the `=`.",
        )
    try:
        return nested({key: load_yaml(value)})
    except yaml.YAMLError:
        return nested({key: value})
