"""What a sweep's file says, before anything that takes seconds to import."""

from __future__ import annotations

from pathlib import Path

from mltfr_dist.config import RunConfig
from mltfr_dist.config.io import dump_yaml
from mltfr_dist.files import with_packaged
from mltfr_dist.resolve import merge_values, parse_override, resolve_config
from mltfr_dist.schema import validate
from mltfr_dist.training.run_folder import read_yaml
from mltfr_dist.tuning.space import SweepConfig, nested, typed_choices


def load_sweep(path: Path, overrides: list[str]) -> SweepConfig:
    """A sweep's file: one that is there, or else one of that name in the package.

    Raises:
        ConfigError: Not valid.
    """
    values = read_yaml(with_packaged(path))
    for override in overrides:
        values = merge_values(values, parse_override(override))
    source = ", ".join([str(path), *(f"`{override}`" for override in overrides)])
    return typed_choices(validate(SweepConfig, values, source=source))


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
    """The same as trials start from it: no baselines, and tables mapped, so that a node holds them once.

    Raises:
        ConfigError: Not valid.
    """
    base = resolved_config(sweep)
    threads = base.training.threads or max(1, int(sweep.resources_per_trial.cpus))
    mltfr = base.mltfr
    if mltfr.enabled and mltfr.placement == "auto" and not mltfr.train_tables:
        mltfr = mltfr.model_copy(update={"placement": "mmap"})
    training = base.training.model_copy(update={"threads": threads})
    return base.model_copy(update={"baselines": (), "training": training, "mltfr": mltfr})


def dump_sweep(sweep: SweepConfig) -> str:
    """The complete sweep as YAML; it loads back to an equal one."""
    return dump_yaml(sweep.model_dump(mode="json"))
