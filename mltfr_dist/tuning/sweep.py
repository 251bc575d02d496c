"""A sweep from its file to its report: checks, Ray, trials, the chosen configuration over several
seeds.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from threading import Thread

from mltfr_dist.config import RunConfig
from mltfr_dist.errors import ConfigError
from mltfr_dist.files import write_atomically
from mltfr_dist.progress import say
from mltfr_dist.training.origin import record_origin
from mltfr_dist.training.run_folder import dump_config, read_yaml
from mltfr_dist.tuning.checks import check_folder, check_inputs, check_machine, check_space
from mltfr_dist.tuning.domain import Domain
from mltfr_dist.tuning.environment import LOOPBACK, set_environment
from mltfr_dist.tuning.plan import planned
from mltfr_dist.tuning.records import BASE, load_trials
from mltfr_dist.tuning.source import SWEEP, base_config, dump_sweep, resolved_config
from mltfr_dist.tuning.space import SweepConfig, with_values

LOCK = "lock"
FINAL = "final"
"""In a sweep's folder: by trial, the runs of the chosen configuration, laid out as a sweep."""


def as_begun(folder: Path, base: RunConfig) -> RunConfig:
    """With the threads that the sweep in ``folder`` began with, where there is one: they are part
    of its trials' runs.
    """
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
        MltfrError: Bad input, before Ray starts; no trial succeeded; or the sweep was asked to
            stop, and has saved.
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
    say(f"sweep `{sweep.name}`: inputs are sound, Ray starts ...")
    set_environment(LOOPBACK if address is None else {})
    from mltfr_dist.tuning.cluster import ray_cluster  # imports Ray, which reads its environment

    imports = Thread(target=import_module, args=["mltfr_dist.tuning.driver"], name="imports")
    imports.start()  # while Ray's daemons start
    with ray_cluster(sweep, base, address, nodes) as cluster, claimed(sweep, base):
        from mltfr_dist.tuning.driver import run_trials

        folder = sweep.folder.resolve()
        for trial in load_trials(folder) if retry_failed else ():
            if trial.state == "failed":
                trial.again()
        run_trials(sweep, base, folder, cluster)
        from mltfr_dist.tuning import report  # plots, of no use to the first trial

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
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be made: {error.strerror}.",
            remedy="Set sweeps_dir to a folder that can be written.",
        ) from None
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
