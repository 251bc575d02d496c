"""A population's runs as they are when they exchange: what another trial goes on from."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mltfr_dist.config import RunConfig
from mltfr_dist.training.run_folder import CHECKPOINTS, CONFIG, INPUTS, dump_config
from mltfr_dist.tuning.records import METRICS, Trial

SNAPSHOTS = "snapshots"
"""In the folder that is Ray's, of a sweep: gone when the sweep is started again."""

KEPT = 2
"""Snapshots of a trial. A trial takes its turn, and with it another's weights, before that one has
two more exchanges behind it.
"""


def take_snapshot(trial: Trial, epochs: int) -> Path:
    """Keep a run that does not go meanwhile; returns where.

    Args:
        trial: Whose.
        epochs: That it has behind it.
    """
    above = trial.sweep / "ray" / SNAPSHOTS / f"{trial.number:04d}"
    target = above / f"{epochs:06d}"
    shutil.rmtree(target, ignore_errors=True)
    copy_run(trial.folder, target)
    for older in sorted(above.iterdir())[:-KEPT]:
        shutil.rmtree(older)
    return target


def make_run(config: RunConfig, snapshot: Path) -> None:
    """Make a run of ``config`` that goes on from another's snapshot."""
    shutil.rmtree(config.folder, ignore_errors=True)  # of an attempt that was cut off here
    copy_run(snapshot, config.folder)
    (config.folder / CONFIG).write_text(dump_config(config))


def copy_run(source: Path, target: Path) -> None:
    """Copy what a run goes on from.

    Files of checkpoints are never changed, so they are linked where the file system can.
    """
    target.mkdir(parents=True)
    shutil.copytree(
        source / CHECKPOINTS,
        target / CHECKPOINTS,
        ignore=shutil.ignore_patterns(".*"),
        copy_function=link,
    )
    for name in (METRICS, INPUTS):
        shutil.copy(source / name, target)


def link(source: str, target: str) -> None:
    """Link a file, or copy it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
