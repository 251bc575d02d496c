"""A sweep from its file to its report: checks, Ray, trials, the chosen configuration over several seeds."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mltfr_dist.config import RunConfig
from mltfr_dist.config.io import dump_yaml
from mltfr_dist.errors import ConfigError
from mltfr_dist.files import packaged_names, with_packaged, write_atomically
from mltfr_dist.resolve import merge_values, parse_override, resolve_config
from mltfr_dist.schema import nearest_key, validate
from mltfr_dist.training.origin import ORIGIN, origins, record_origin
from mltfr_dist.training.run_folder import dump_config, read_yaml
from mltfr_dist.tuning import report
from mltfr_dist.tuning.checks import check_folder, check_inputs, check_machine, check_space
from mltfr_dist.tuning.environment import LOOPBACK, set_environment
from mltfr_dist.tuning.plan import planned
from mltfr_dist.tuning.space import Domain, SweepConfig, nested, typed_choices, with_values
from mltfr_dist.tuning.trials import BASE, SWEEP, load_trials

SPACES = Path("tuning/spaces")
"""Folder of the ready-made spaces, in the repository and in the package."""

LOCK = "lock"
FINAL = "final"
"""In a sweep's folder: by trial, the runs of the chosen configuration, laid out as a sweep."""


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
    """The file of a space: ``path``, or where it is a bare name and no file, the ready-made space of that name.

    Raises:
        ConfigError: A bare name that is neither.
    """
    if path.is_file() or path.suffix or path.name != str(path):
        return with_packaged(path)
    names = packaged_names(f"{SPACES}/*.yaml")
    if path.name not in names:
        near = nearest_key(path.name, names)
        raise ConfigError(
            f"There is no file and no ready-made space `{path}`"
            + (f"; the nearest is `{near}`." if near else "."),
            remedy=f"Give a YAML file, or one of {', '.join(names)}.",
        )
    return with_packaged(SPACES / f"{path.name}.yaml")


def go_where_begun(space: Path) -> Path:
    """Where ``space`` is the `sweep.yaml` of a sweep's folder: work in the folder in which that was started.

    All that a sweep names, its own folder included, is relative to it. Returns ``space``, absolute.

    Raises:
        ConfigError: From nowhere that is known does the sweep's file lead to its folder: it was moved.
    """
    folder = space.absolute().parent
    if space.name != SWEEP or not (folder / ORIGIN).exists():
        return space
    begins = [begin for begin in origins(folder) if begin.is_dir()]
    sweep = validate(SweepConfig, read_yaml(space), source=str(space))
    for begin in begins:
        if (begin / sweep.folder).resolve() == folder.resolve():
            if begin != Path.cwd():
                print(f"working in {begin}, where the sweep `{sweep.name}` was started", flush=True)
                os.chdir(begin)
            return folder / SWEEP
    places = ", nor ".join(str(begin / sweep.folder) for begin in begins)
    raise ConfigError(
        f"{folder} was moved: the sweep `{sweep.name}` is not at {places}.",
        rule="A sweep's paths begin where it was started, and its folder can be moved only with "
        "all that it reads.",
        remedy="Move it back to one of these places.",
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


def as_begun(folder: Path, base: RunConfig) -> RunConfig:
    """With the threads that the sweep in ``folder`` began with, where there is one: they are part of its trials' runs."""
    if not (folder / BASE).exists():
        return base
    threads = read_yaml(folder / BASE)["training"]["threads"]
    return with_values(base, {"training.threads": threads})


def run_sweep(
    sweep: SweepConfig,
    *,
    address: str | None = None,
    nodes: int = 1,
    retry_failed: bool = False,
) -> Path:
    """Run or go on with a sweep; returns its report.

    Args:
        sweep: The sweep.
        address: Of a Ray cluster, `host:port`; None starts one on this machine.
        nodes: Nodes that the cluster at ``address`` shall have before the sweep begins.
        retry_failed: Whether trials that failed go on, from their last checkpoint.

    Raises:
        MltfrError: Bad input, before Ray starts; no trial succeeded; or the sweep was asked to stop, and has saved.
    """
    base = as_begun(sweep.folder, base_config(sweep))
    check_space(sweep, base)
    check_folder(sweep.folder, sweep, base)
    if (sweep.folder / LOCK).exists():
        with lock_folder(sweep.folder):
            pass  # told before Ray starts, which takes seconds
    if address is None:
        check_machine(sweep)
    check_inputs(sweep, base)  # last, for it reads files of any size
    print(f"sweep `{sweep.name}`: inputs are sound, Ray starts ...", flush=True)
    set_environment(LOOPBACK if address is None else {})
    from mltfr_dist.tuning.cluster import (
        ray_cluster,
    )  # imports Ray, which reads its environment then
    from mltfr_dist.tuning.driver import run_trials

    with ray_cluster(sweep, base, address, nodes) as cluster, claimed(sweep, base):
        folder = sweep.folder.resolve()
        for trial in load_trials(folder) if retry_failed else ():
            if trial.state == "failed":
                trial.again()
        run_trials(sweep, base, folder, cluster)
        best = report.choose(sweep, load_trials(folder))
        report.write_best(sweep, resolved_config(sweep), best)
        final_folder = folder / FINAL / best.name
        if sweep.final_seeds:
            final_base = with_values(base, best.values)
            run_trials(final_sweep(sweep), final_base, final_folder, cluster, read_test=True)
        return report.write(sweep, load_trials(folder), load_trials(final_folder))


def plan_sweep(sweep: SweepConfig) -> str:
    """What :func:`run_sweep` would run, checked as it checks; nothing is written.

    Raises:
        MltfrError: Bad input.
    """
    base = as_begun(sweep.folder, base_config(sweep))
    check_space(sweep, base)
    check_folder(sweep.folder, sweep, base)
    check_inputs(sweep, base)
    return "\n".join(planned(sweep, base))


def final_sweep(sweep: SweepConfig) -> SweepConfig:
    """The final seeds, as a sweep without early stopping."""
    return sweep.model_copy(
        update={
            "search": {"training.seed": Domain(choices=sweep.final_seeds)},
            "algorithm": "grid",
            "num_trials": None,
            "include_base": False,
            "scheduler": "none",
        }
    )


@contextmanager
def claimed(sweep: SweepConfig, base: RunConfig) -> Iterator[None]:
    """Hold the sweep's folder, alone.

    Raises:
        ConfigError: Another process runs this sweep.
    """
    folder = sweep.folder
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder):
        write_atomically(folder / SWEEP, dump_sweep(sweep))
        write_atomically(folder / BASE, dump_config(base))
        record_origin(folder)
        shutil.rmtree(folder / "ray", ignore_errors=True)
        yield


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of a sweep's folder.

    Raises:
        ConfigError: Another process holds it.
    """
    with (folder / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"Another process runs the sweep in {folder}.", remedy="Wait for it, or end it."
            ) from None
        yield


def dump_sweep(sweep: SweepConfig) -> str:
    """The complete sweep as YAML; it loads back to an equal one."""
    return dump_yaml(sweep.model_dump(mode="json"))
