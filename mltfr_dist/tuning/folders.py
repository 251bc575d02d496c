"""`mltfr report` of a folder, whichever it is: a run, the bare backbone inside it, a sweep, a trial
of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from mltfr_dist.errors import CheckpointError, ConfigError
from mltfr_dist.invocation import train_command
from mltfr_dist.training.run_folder import CONFIG, REPORT, Result, load_config, load_result
from mltfr_dist.tuning.records import (
    BASE,
    METRICS,
    TRIALS,
    Trial,
    load_trial,
    load_trials,
    read_validations,
)
from mltfr_dist.tuning.source import SWEEP

MOST_NAMED = 3
"""Runs and sweeps that an error names at most."""


def folder_report(folder: str | Path) -> str:
    """What a folder of results says.

    Raises:
        ConfigError: It is not finished; the remedy is the command that goes on with it.
        CheckpointError: It holds neither a run nor a sweep.
    """
    folder = Path(folder)
    if (folder / REPORT).exists():
        return (folder / REPORT).read_text()
    if (folder / SWEEP).exists():
        raise unfinished_sweep(folder)
    if not (folder / CONFIG).exists():
        raise no_results(folder)
    config = load_config(folder)
    result = load_result(folder)
    if result is not None:
        return result_text(folder, config.training.seed, result)
    raise unfinished_run(folder)


def result_text(folder: Path, seed: int, result: Result) -> str:
    """The outcome of a run that has no report of its own: a backbone's, or a trial's."""
    splits = {"valid": result.valid, "test": result.test}
    lines = [f"# {folder}", "", "| metric | " + " | ".join(splits) + " |", "|---|---|---|"]
    for name in result.valid:
        cells = (f"{values[name]:.6f}" if values else "not read" for values in splits.values())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Stage `{result.stage}`, epoch {result.epoch} of {result.epochs}, {result.parameters:,} "
        f"trained parameters, seed {seed}, {result.seconds:.0f} s.",
        "",
    ]
    return "\n".join(lines)


def unfinished_run(folder: Path) -> ConfigError:
    """The error for a run without a result; it names who began the run, for that one goes on with
    it.
    """
    sweep = next((parent for parent in folder.parents if (parent / SWEEP).exists()), None)
    epochs = len(read_validations(folder / METRICS))
    what = f"The run {folder} is not finished: {epochs} epochs are validated."
    if sweep is not None:
        number = folder.name[:4]
        if (folder.parent / f"{number}.json").exists():  # else it was deleted
            trial = load_trial(folder.parents[1], int(number))
            if trial.record.ended is not None:
                return ended_trial(trial, sweep / SWEEP, epochs)
        return ConfigError(
            what,
            rule="It is a trial of a sweep; run by itself it would read the test split.",
            remedy=f"Go on with the sweep: `mltfr sweep {sweep / SWEEP}`.",
        )
    owner = folder.parent if (folder.parent / CONFIG).exists() else folder
    return ConfigError(what, remedy=f"Go on: `{train_command()} --config {owner / CONFIG}`.")


def ended_trial(trial: Trial, sweep: Path, epochs: int) -> ConfigError:
    """The error for a trial that was stopped early or failed: the sweep does not go on with it."""
    assert trial.record.ended is not None
    state, reason = trial.record.ended.state, trial.record.ended.reason
    how = "was stopped early" if state == "stopped" else "failed"
    remedy = f"`mltfr sweep {sweep} --retry-failed` has failed trials go on."
    if state == "stopped":
        remedy = f"`mltfr report {sweep.parent}` has its place among the others, "
        remedy += f"{trial.folder / METRICS} all of its validations."
    return ConfigError(
        f"The trial {trial.folder} {how} ({reason.rstrip('.')}): {epochs} epochs are validated.",
        remedy=remedy,
    )


def no_results(folder: Path) -> CheckpointError:
    """The error for what is neither a run nor a sweep; it names those that are next to it."""
    if not folder.exists():
        what, remedy = "there is no such folder", "Name the folder of a run or a sweep."
    else:
        what = f"there is neither {CONFIG} nor {SWEEP}"
        above = next((p for p in folder.parents if (p / CONFIG).exists() or is_sweep(p)), None)
        below = [] if above else sorted(results_below(folder))[:MOST_NAMED]
        if above is not None:
            remedy = f"It lies in one: `mltfr report {above}`."
        elif below:
            remedy = f"Name one of those below it: `mltfr report {below[0]}`"
            remedy += "".join(f", {other}" for other in below[1:]) + "."
        else:
            remedy = "Name a run's folder, such as runs/demo, or a sweep's; of prepared data and "
            remedy += f"of token tables, `mltfr inspect {folder}` says what they hold."
    return CheckpointError(f"{folder} holds no run and no sweep: {what}.", remedy=remedy)


def is_sweep(folder: Path) -> bool:
    """Whether ``folder`` is a sweep's."""
    return (folder / SWEEP).exists() and (folder / BASE).exists()


def results_below(folder: Path) -> Iterator[Path]:
    """Runs and sweeps in ``folder``, and in the folders in it."""
    for pattern in ("*", "*/*"):
        for path in folder.glob(pattern):
            if is_sweep(path) or ((path / CONFIG).exists() and not (path.parent / CONFIG).exists()):
                yield path


def unfinished_sweep(folder: Path) -> ConfigError:
    """The error for a sweep without a report."""
    states = [trial.state for trial in load_trials(folder)] if (folder / TRIALS).exists() else []
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return ConfigError(
        f"The sweep {folder} is not finished: {len(states)} trials ({counts or 'none begun'}).",
        remedy=f"Go on: `mltfr sweep {folder / SWEEP}`.",
    )
