"""`mltfr report` of a folder, whichever it is: a run, the bare backbone inside it, a sweep, a trial
of one.
"""

from __future__ import annotations

from pathlib import Path

from mltfr_dist.errors import ConfigError
from mltfr_dist.invocation import train_command
from mltfr_dist.training.run_folder import CONFIG, REPORT, Result, load_config, load_result
from mltfr_dist.tuning.records import (
    METRICS,
    TRIALS,
    Trial,
    load_trial,
    load_trials,
    read_validations,
)
from mltfr_dist.tuning.source import SWEEP


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


def unfinished_sweep(folder: Path) -> ConfigError:
    """The error for a sweep without a report."""
    states = [trial.state for trial in load_trials(folder)] if (folder / TRIALS).exists() else []
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return ConfigError(
        f"The sweep {folder} is not finished: {len(states)} trials ({counts or 'none begun'}).",
        remedy=f"Go on: `mltfr sweep {folder / SWEEP}`.",
    )
