"""What a sweep will run: its points, checked as runs are, less those that are done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mltfr_dist.config import RunConfig
from mltfr_dist.tables.store import TokenTable, load_table
from mltfr_dist.training.checks import check_tables
from mltfr_dist.training.run_folder import leaf_values
from mltfr_dist.tuning.numbering import next_trial
from mltfr_dist.tuning.records import Trial, load_trials
from mltfr_dist.tuning.space import SweepConfig, Values, base_values, shown, with_values
from mltfr_dist.tuning.suggest import STARTUP_TRIALS, Known, Space


def make_space(sweep: SweepConfig, base: RunConfig) -> Space:
    """The sweep's points, each checked as a run checks its configuration and the sizes of its
    tables.

    The tables must be there (:func:`mltfr_dist.tuning.checks.check_inputs`).
    """
    leaves = leaf_values(base)
    stored: dict[Path, TokenTable] = {}

    def check(values: Values) -> None:
        config = with_values(base, values)
        if config.mltfr.enabled and config.mltfr.filter.strategy != "seed_words":  # it cuts tables
            for path in config.mltfr.tables:
                if path not in stored:
                    stored[path] = load_table(path, verify=False)
            check_tables(config, [stored[path] for path in config.mltfr.tables])

    return Space(
        sweep,
        {key: leaves[key] for key in sweep.search},
        base_values(sweep, base) if sweep.include_base else None,
        check,
    )


def known_trials(trials: Sequence[Trial], metric: str) -> dict[int, Known]:
    """Trials by number as the search sees them; of those that failed only the values."""
    return {
        t.number: Known(t.values, None if t.state == "failed" else t.best(metric)) for t in trials
    }


def space_lines(space: Space) -> list[str]:
    """What of the space is not tried, and why."""
    asked, lines = space.sweep.num_trials, []
    if asked is not None and space.num_trials < asked:
        lines.append(
            f"  the space has {space.num_trials} points that can run, fewer than "
            f"num_trials={asked}: each is tried once"
        )
    if space.left_out:
        values, reason = next(iter(space.left_out.items()))
        lines.append(
            f"  {len(space.left_out)} points cannot run and are left out, such as {values}: "
            f"{reason}"
        )
    return lines


def planned(sweep: SweepConfig, base: RunConfig) -> list[str]:
    """Each trial that the sweep would run now, a line each."""
    space, trials = make_space(sweep, base), load_trials(sweep.folder)
    known = known_trials(trials, sweep.metric_name)
    lines = [
        f"  trial {t.name}  {shown(t.values)}, going on" for t in trials if t.state == "unfinished"
    ]
    while sweep.algorithm != "tpe" or len(known) < STARTUP_TRIALS:
        coming = next_trial(space, sweep.folder, known)
        if coming is None:
            break
        values, again = coming.record.values, ", was deleted" * coming.was_deleted
        lines.append(f"  trial {coming.number:04d}  {shown(values)}{again}")
        known[coming.number] = Known(values, None)
    if (later := space.num_trials - len(known)) > 0:
        lines.append(f"  {later} more, whose values tpe chooses by what these give")
    head = f"sweep `{sweep.name}`: {len(trials)} of {space.num_trials} trials are there; to run:"
    return [head, *space_lines(space), *lines]
