"""PNG plots of a sweep, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mltfr_dist.tuning.domain import Domain
from mltfr_dist.tuning.records import Trial
from mltfr_dist.tuning.space import SweepConfig, short, shown_value

PALETTE = colormaps["viridis_r"]
"""From the worst value (0, pale) to the best (1, dark)."""

BEST: dict[str, Any] = {"color": "#d62728", "linewidth": 3}
LABEL: dict[str, Any] = {
    "fontsize": 8,
    "va": "center",
    "zorder": 4,
    "bbox": {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
}
MEAN: dict[str, Any] = {"color": "#d62728"}

GOLDEN = (5**0.5 - 1) / 2


def height(domain: Domain, value: object) -> float:
    """Where a value lies on its axis, from 0 to 1."""
    if domain.ends is None:
        options = domain.options() or []
        return (options.index(value) + 0.5) / len(options)
    low, high, at = (float(x) for x in (*domain.ends, value))  # type: ignore[arg-type]
    if domain.log_uniform:
        low, high, at = np.log(low), np.log(high), np.log(at)
    return (at - low) / (high - low)


def ticks(domain: Domain) -> dict[float, str]:
    """Height to label."""
    values = domain.options() or list(domain.ends or ())
    return {height(domain, value): shown_value(value) for value in values}


def parallel_coordinates(
    sweep: SweepConfig, ranked: Sequence[tuple[float, Trial]], path: Path
) -> None:
    """One line a trial over an axis a field, coloured by the objective; trials that were stopped
    early are dashed.
    """
    keys = list(sweep.search)
    figure = Figure(figsize=(max(6.0, 2.2 * len(keys) + 2), 5))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    values = [value for value, _ in ranked]
    low, high = min(values), max(values)
    for rank, (value, trial) in reversed(list(enumerate(ranked))):
        shade = (value - low) / (high - low) if high > low else 1.0
        heights = [height(sweep.search[key], trial.values[key]) for key in keys]
        look = BEST if rank == 0 else {"color": PALETTE(0.85 * shade), **others(len(ranked))}
        axes.plot(
            [*range(len(keys)), len(keys)],
            [*heights, shade],
            "--" if trial.state == "stopped" else "-",
            label=f"best: trial {trial.name}, {value:.4f}" if rank == 0 else None,
            zorder=2 + shade,
            **look,
        )
    for index, key in enumerate(keys):
        axes.axvline(index, color="0.7", zorder=0)
        for at, text in ticks(sweep.search[key]).items():
            axes.annotate(
                text,
                (index, at),
                xytext=(4, 0),
                textcoords="offset points",
                **LABEL,
            )
    axes.axvline(len(keys), color="0.7", zorder=0)
    for at in (0.0, 0.5, 1.0):
        label = f"{low + at * (high - low):.4f}"
        axes.annotate(
            label,
            (len(keys), at),
            xytext=(4, 0),
            textcoords="offset points",
            **LABEL,
        )
    axes.set_xticks(range(len(keys) + 1), [*(short(key) for key in keys), sweep.metric])
    axes.set_yticks([])
    axes.set_xlim(-0.15, len(keys) + 0.35)
    axes.set_ylim(-0.05, 1.05)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(f"{sweep.name}: one line a trial, dashed where stopped early")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.06), frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def effects(
    sweep: SweepConfig, grouped: Mapping[str, Mapping[str, Sequence[Trial]]], epoch: int, path: Path
) -> None:
    """One panel a field: each trial's objective after ``epoch`` epochs over its value, and means.

    Of a range the mean is that of a third of its trials, which lie one after another.
    """
    figure = Figure(figsize=(max(5.0, 3.4 * len(grouped)), 4))
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(grouped), sharey=True, squeeze=False)[0]
    for panel, (key, grouped_trials) in zip(panels, grouped.items()):
        for index, some in enumerate(grouped_trials.values()):
            points = [
                max(v.metrics[sweep.metric_name] for v in t.validations() if v.epoch <= epoch)
                for t in some
            ]
            at = positions(sweep.search[key], index, [(t.number, t.values[key]) for t in some])
            panel.plot(at, points, "o", color=PALETTE(0.4), alpha=0.5, markersize=4, mew=0)
            ends = [index - 0.3, index + 0.3] if is_listed(sweep.search[key]) else [at[0], at[-1]]
            panel.plot(ends, [np.mean(points)] * 2, linewidth=2.5, **MEAN)
        if is_listed(sweep.search[key]):
            panel.set_xticks(
                range(len(grouped_trials)),
                list(grouped_trials),
                rotation=30,
                ha="right",
                fontsize=8,
            )
        else:
            panel.tick_params(axis="x", labelsize=8)
            if sweep.search[key].log_uniform:
                panel.set_xscale("log")
        panel.set_title(short(key))
        panel.grid(axis="y", color="0.9")
    panels[0].set_ylabel(f"{sweep.metric} after {epoch} epochs")
    panels[-1].plot([], [], linewidth=2.5, label="mean", **MEAN)
    panels[-1].legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def is_listed(domain: Domain) -> bool:
    """Whether a field's values stand side by side, by name; a range's lie where they are."""
    return domain.options() is not None


def positions(domain: Domain, index: int, trials: Sequence[tuple[int, Any]]) -> list[float]:
    """Where points lie along a field's axis: numbers where they are, or else slopes would show.

    Names are spread about their index, by the trial's number in steps of the golden ratio: evenly,
    and whatever their order.

    Args:
        domain: The field's values.
        index: Of the value, where they are listed.
        trials: Number of each trial, and its value.
    """
    if not is_listed(domain):
        return [float(value) for _, value in trials]
    if all(isinstance(value, int | float) for _, value in trials):
        return [float(index)] * len(trials)
    return [index + 0.36 * ((number * GOLDEN) % 1 - 0.5) for number, _ in trials]


def others(count: int) -> dict[str, float]:
    """Lines of the trials that are not the best: the more there are, the paler."""
    return {"linewidth": 1.2 if count < 30 else 0.7, "alpha": min(0.8, max(0.25, 20 / count))}
