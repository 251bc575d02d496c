"""The next trial of a sweep: its number and values.

A number is one trial's for ever, and draws its values. So a trial that was deleted is run again
under its own: with the values of its run where that is still there, else as its number draws them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mltfr_dist.training.run_folder import CONFIG, leaf_values, load_config
from mltfr_dist.tuning.records import TRIALS, Record
from mltfr_dist.tuning.suggest import Known, Space, suggest


class Next(NamedTuple):
    """A trial to come."""

    number: int
    record: Record
    was_deleted: bool
    """Whether there was one of this number."""


def next_trial(space: Space, folder: Path, known: Mapping[int, Known]) -> Next | None:
    """The trial that a sweep lacks first; None where it has all.

    Args:
        space: The sweep's points.
        folder: Where its trials lie.
        known: Those that it has, by number.

    Raises:
        ConfigError: No values can be drawn, or a deleted trial's configuration cannot be read.
    """
    if len(known) >= space.num_trials:
        return None
    taken = [trial.values for trial in known.values()]
    for number in itertools.count():
        if number in known:
            continue
        record = record_left(space, folder, number)
        if record is None:
            values = suggest(space, list(known.values()), number)
            was_deleted = number < max(known, default=-1)
            return None if values is None else Next(number, Record(values=values), was_deleted)
        if record.values not in taken and space.can_run(record.values):
            return Next(number, record, was_deleted=True)
        # Another has its values by now: the number is not given again.
    raise AssertionError


def record_left(space: Space, folder: Path, number: int) -> Record | None:
    """The record of a trial that has none any more, by the run that it left; None for no run.

    Raises:
        ConfigError: The run's configuration cannot be read.
    """
    runs = [path.parent for path in (folder / TRIALS).glob(f"{number:04d}*/{CONFIG}")]
    if not runs:
        return None
    last = max(runs, key=lambda run: (len(run.name), run.name))  # 0003, 0003-2, ... 0003-10
    leaves = leaf_values(load_config(last))
    generation = int(last.name.partition("-")[2] or 1) - 1
    return Record(values={key: leaves[key] for key in space.sweep.search}, generation=generation)
