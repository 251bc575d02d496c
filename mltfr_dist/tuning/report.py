"""What a sweep found: the ranking, what each field does, the chosen configuration as a file,
report.md and plots.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from mltfr_dist.config import RunConfig
from mltfr_dist.errors import MltfrError
from mltfr_dist.files import write_atomically
from mltfr_dist.schema import changed
from mltfr_dist.training.reporting.matrix import interval
from mltfr_dist.training.reporting.matrix import shown as mean_and_interval
from mltfr_dist.training.run_folder import dump_config, load_result
from mltfr_dist.tuning import plots
from mltfr_dist.tuning.records import Trial
from mltfr_dist.tuning.space import SweepConfig, short, shown_value, with_values

REPORT, BEST, PARALLEL, EFFECTS = "report.md", "best.yaml", "parallel.png", "effects.png"
BINS = 3
"""Parts of equal count into which a range's values are put where its effect is measured."""


def ranking(sweep: SweepConfig, trials: Sequence[Trial]) -> list[tuple[float, Trial]]:
    """Trials with a validation, best first; those that failed are left out."""
    values = [(trial.best(sweep.metric_name), trial) for trial in trials if trial.state != "failed"]
    return sorted(
        ((value, t) for value, t in values if value is not None),
        key=lambda pair: (-pair[0], pair[1].number),
    )


def choose(sweep: SweepConfig, trials: Sequence[Trial]) -> Trial:
    """The trial with the best validation.

    Raises:
        MltfrError: None has any.
    """
    ranked = ranking(sweep, trials)
    if not ranked:
        reasons = dict.fromkeys(trial.record.ended.reason for trial in trials if trial.record.ended)
        raise MltfrError(
            f"None of the {len(trials)} trials of `{sweep.name}` succeeded: {'; '.join(reasons)}.",
            remedy=f"Correct the space or the inputs, delete {sweep.folder}, and start again.",
        )
    return ranked[0][1]


def write_best(sweep: SweepConfig, resolved: RunConfig, best: Trial) -> None:
    """best.yaml: the chosen configuration, complete, as train.py runs it, without what trials need
    (threads, no baselines).
    """
    config = with_values(resolved, best.values)
    own = {"name": f"{sweep.name}-best", "runs_dir": sweep.folder}
    write_atomically(sweep.folder / BEST, dump_config(changed(config, own, source="the sweep")))


def common_epoch(trials: Sequence[Trial]) -> int:
    """Epochs that every trial with a validation has behind it."""
    return min(
        (trial.validations()[-1].epoch for trial in trials if trial.validations()), default=0
    )


def at_epoch(sweep: SweepConfig, trial: Trial, epoch: int) -> float:
    """The best validation of the first ``epoch`` epochs."""
    return max(v.metrics[sweep.metric_name] for v in trial.validations() if v.epoch <= epoch)


def groups(sweep: SweepConfig, key: str, trials: Sequence[Trial]) -> dict[str, list[Trial]]:
    """Trials by the value of a field; a range's by thirds of its values."""
    domain = sweep.search[key]
    if domain.options() is not None:
        pairs = [
            (shown_value(option), [t for t in trials if t.values[key] == option])
            for option in domain.options() or []
        ]
        return {text: some for text, some in pairs if some}
    ordered = sorted(trials, key=lambda trial: (trial.values[key], trial.number))
    edges = [round(i * len(ordered) / BINS) for i in range(BINS + 1)]
    slices = [ordered[a:b] for a, b in itertools.pairwise(edges) if a < b]
    return {
        f"{shown_value(group[0].values[key])} to {shown_value(group[-1].values[key])}": group
        for group in slices
    }


def importance(sweep: SweepConfig, key: str, trials: Sequence[Trial], epoch: int) -> float:
    """Share of the trials' variance that a field's value accounts for: the correlation ratio eta
    squared, from 0 to 1.

    Adjusted for the number of groups as R squared is, or else a field of many values would look
    important by chance; what is then below 0 is 0. All trials are compared after the same number of
    epochs, or early stopping would be part of it.
    """
    slices = list(groups(sweep, key, trials).values())
    values = [[at_epoch(sweep, trial, epoch) for trial in group] for group in slices]
    everything = [value for group in values for value in group]
    spare = len(everything) - len(slices)
    mean = math.fsum(everything) / len(everything)
    total = math.fsum((value - mean) ** 2 for value in everything)
    if spare < 1 or not total:
        return 0.0
    within = math.fsum(
        (value - math.fsum(group) / len(group)) ** 2 for group in values for value in group
    )
    return max(0.0, 1 - (within / spare) / (total / (len(everything) - 1)))


def write(sweep: SweepConfig, trials: Sequence[Trial], finals: Sequence[Trial]) -> Path:
    """report.md and its plots.

    Returns:
        The report's path.
    """
    ranked = ranking(sweep, trials)
    seen = [trial for _, trial in ranked]
    epoch = common_epoch(seen)
    weights = {key: importance(sweep, key, seen, epoch) for key in sweep.search}
    plots.parallel_coordinates(sweep, ranked, sweep.folder / PARALLEL)
    plots.effects(
        sweep, {key: groups(sweep, key, seen) for key in weights}, epoch, sweep.folder / EFFECTS
    )
    best = choose(sweep, trials)
    text = [
        f"# Sweep {sweep.name}",
        "",
        *summary_lines(sweep, trials, best),
        "",
        "## The chosen configuration",
        "",
    ]
    text += [
        f"Trial {best.name}: "
        f"{', '.join(f'`{k}` = {shown_value(v)}' for k, v in best.values.items())}.",
        "",
    ]
    text += [
        "```",
        f"deepspeed train.py --config {sweep.folder / BEST}",
        "```",
        "",
        *final_lines(sweep, finals),
    ]
    text += ["", "## Ranking", "", *ranking_table(sweep, ranked), ""]
    text += ["## What each field does", "", *importance_lines(sweep, weights, seen, epoch), ""]
    text += [
        f"![Parallel coordinates: one line a trial]({PARALLEL})",
        "",
        f"![Effect of each field]({EFFECTS})",
        "",
    ]
    failed = [trial for trial in trials if trial.state == "failed"]
    if failed:
        text += ["## Failed", ""]
        text += [
            f"- Trial {trial.name}: {trial.record.ended.reason}"
            for trial in failed
            if trial.record.ended
        ] + [""]
    write_atomically(sweep.folder / REPORT, "\n".join(text))
    return sweep.folder / REPORT


def summary_lines(sweep: SweepConfig, trials: Sequence[Trial], best: Trial) -> list[str]:
    """What was done, and what the best value is worth."""
    states = [trial.state for trial in trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    value = best.best(sweep.metric_name)
    return [
        f"{len(trials)} trials ({counts}), {sweep.algorithm} search, scheduler {sweep.scheduler}, "
        f"seed {sweep.seed}; objective "
        f"{sweep.metric}, best validation of a trial: **{value:.4f}**.",
        "",
        f"The best of {len(trials)} is the best partly by luck: its validation value is too high. "
        f"What it is worth, the "
        "runs over the final seeds say, which alone have read the test split.",
    ]


def final_lines(sweep: SweepConfig, finals: Sequence[Trial]) -> list[str]:
    """Mean and interval over the final seeds."""
    results = {trial.values["training.seed"]: load_result(trial.folder) for trial in finals}
    done = {seed: result for seed, result in results.items() if result is not None and result.test}
    if not done:
        return ["No final seed was run: the test split is unread."]
    lines = [
        f"Over {len(done)} seed{'s' * (len(done) > 1)} ({', '.join(map(str, done))}), mean +- "
        "95% t-interval:",
        "",
        "| metric | valid | test |",
        "|---|---|---|",
    ]
    for name in next(iter(done.values())).test:
        cells = [
            mean_and_interval(*interval([getattr(r, split)[name] for r in done.values()]))
            for split in ("valid", "test")
        ]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    failed = [
        f"seed {trial.values['training.seed']}: {trial.record.ended.reason}"
        for trial in finals
        if trial.record.ended
    ]
    return lines + [f"\nFailed: {'; '.join(failed)}."] * bool(failed)


def ranking_table(sweep: SweepConfig, ranked: Sequence[tuple[float, Trial]]) -> list[str]:
    """One row a trial, best first."""
    head = ["trial", sweep.metric, *(short(key) for key in sweep.search), "epochs", "state"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for value, trial in ranked:
        state = f"stopped by {trial.record.ended.reason}" if trial.record.ended else trial.state
        cells = [
            trial.name,
            f"{value:.4f}",
            *(shown_value(trial.values[key]) for key in sweep.search),
        ]
        lines.append("| " + " | ".join([*cells, str(trial.validations()[-1].epoch), state]) + " |")
    return lines


def importance_lines(
    sweep: SweepConfig, weights: dict[str, float], trials: Sequence[Trial], epoch: int
) -> list[str]:
    """Importance and mean by value, the most important field first."""
    lines = [
        f"Importance: share of the variance of {sweep.metric} that the field's value accounts for "
        f"(adjusted eta squared), all "
        f"{len(trials)} trials after {epoch} epochs, which every one of them has. With few trials "
        f"it is a hint, not a test.",
        "",
        "| field | importance | mean by value (trials) |",
        "|---|---|---|",
    ]
    for key, weight in sorted(weights.items(), key=lambda pair: -pair[1]):
        means = []
        for text, some in groups(sweep, key, trials).items():
            mean = math.fsum(at_epoch(sweep, trial, epoch) for trial in some) / len(some)
            means.append(f"{text}: {mean:.4f} ({len(some)})")
        lines.append(f"| `{key}` | {weight:.2f} | {', '.join(means)} |")
    return lines
