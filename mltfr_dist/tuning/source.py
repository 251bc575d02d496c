"""What a sweep's file says, before anything that takes seconds to import."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mltfr_dist.config import RunConfig
from mltfr_dist.config.io import dump_yaml
from mltfr_dist.errors import ConfigError
from mltfr_dist.files import packaged_names, with_packaged
from mltfr_dist.progress import say
from mltfr_dist.resolve import merge_values, parse_override, resolve_config
from mltfr_dist.schema import changed, nested, or_nearest, validate
from mltfr_dist.training.origin import ORIGIN, origins
from mltfr_dist.training.run_folder import read_yaml
from mltfr_dist.tuning.space import SweepConfig, typed_choices

SWEEP = "sweep.yaml"
"""In a sweep's folder, the complete sweep."""
SPACES = Path("tuning/spaces")
"""Folder of the ready-made spaces, in the repository and in the package."""


def load_sweep(path: str | Path, overrides: Sequence[str]) -> SweepConfig:
    """A sweep's file: one that is there, or else one of that name in the package.

    Raises:
        ConfigError: Not valid.
    """
    values = read_yaml(space_file(Path(path)))
    for override in overrides:
        values = merge_values(values, parse_override(override))
    source = ", ".join([str(path), *(f"`{override}`" for override in overrides)])
    return typed_choices(validate(SweepConfig, values, source=source))


def space_file(path: Path) -> Path:
    """The file of a space: ``path``, or where it is a bare name and no file, the ready-made space
    of that name.

    Raises:
        ConfigError: A bare name that is neither.
    """
    if path.is_file() or path.suffix or path.name != str(path):
        return with_packaged(path)
    names = packaged_names(f"{SPACES}/*.yaml")
    if path.name not in names:
        raise ConfigError(
            f"There is no file and no ready-made space `{path}`{or_nearest(path.name, names)}.",
            remedy=f"Give a YAML file, or one of {', '.join(names)}.",
        )
    return with_packaged(SPACES / f"{path.name}.yaml")


def go_where_begun(space: Path) -> Path:
    """Where ``space`` is the `sweep.yaml` of a sweep's folder: work in the folder in which that was
    started.

    All that a sweep names, its own folder included, is relative to it. Returns ``space``, absolute.

    Raises:
        ConfigError: From nowhere that is known does the sweep's file lead to its folder: it was
            moved.
    """
    folder = space.absolute().parent
    if space.name != SWEEP or not (folder / ORIGIN).exists():
        return space
    begins = [begin for begin in origins(folder) if begin.is_dir()]
    sweep = validate(SweepConfig, read_yaml(space), source=str(space))
    for begin in begins:
        if (begin / sweep.folder).resolve() == folder.resolve():
            if begin != Path.cwd():
                say(f"working in {begin}, where the sweep `{sweep.name}` was started")
                os.chdir(begin)
            return folder / SWEEP
    paths = ", nor ".join(str(begin / sweep.folder) for begin in begins)
    raise ConfigError(
        f"{folder} was moved: the sweep `{sweep.name}` is not at {paths}.",
        rule="A sweep's paths begin where it was started, and its folder can be moved only with "
        "all that it reads.",
        remedy="Move it back to one of these folders.",
    )


def resolved_config(sweep: SweepConfig) -> RunConfig:
    """The configuration that the sweep's file names.

    Raises:
        ConfigError: Not valid.
    """
    base = resolve_config(sweep.preset, sweep.config, [])
    source = f"`overrides` of the sweep `{sweep.name}`"
    return validate(
        RunConfig,
        merge_values(base.model_dump(mode="json"), nested(sweep.overrides)),
        source=source,
    )


def base_config(sweep: SweepConfig) -> RunConfig:
    """The same as trials start from it: no baselines, and tables mapped, so that a node holds them
    once.

    Raises:
        ConfigError: Not valid.
    """
    base = resolved_config(sweep)
    threads = base.training.threads or max(1, int(sweep.resources_per_trial.cpus))
    fields: dict[str, Any] = {"baselines": (), "training.threads": threads}
    mltfr = base.mltfr
    if mltfr.enabled and mltfr.placement == "auto" and not base.published.trained_tables:
        fields["mltfr.placement"] = "mmap"
    return changed(base, fields, source="the sweep")


def dump_sweep(sweep: SweepConfig) -> str:
    """The complete sweep as YAML; it loads back to an equal one."""
    return dump_yaml(sweep.model_dump(mode="json"))
