"""PNG plots of a sweep, drawn with matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mltfr_dist.tuning.space import Domain, SweepConfig, short, shown_value
from mltfr_dist.tuning.trials import Trial


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
    """One line a trial over an axis a field, coloured by the objective; trials that were stopped early are dashed."""
    keys = list(sweep.search)
    figure = Figure(figsize=(max(6.0, 2.2 * len(keys) + 2), 5))
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    values = [value for value, _ in ranked]
    low, high = min(values), max(values)
    for value, trial in reversed(ranked):
        shade = (value - low) / (high - low) if high > low else 1.0
        heights = [height(sweep.search[key], trial.values[key]) for key in keys]
        style = "--" if trial.state == "stopped" else "-"
        axes.plot(
            [*range(len(keys)), len(keys)],
            [*heights, shade],
            style,
            color=colour(shade),
            linewidth=1 + 2 * shade,
        )
    for place, key in enumerate(keys):
        axes.axvline(place, color="0.7", zorder=0)
        for at, text in ticks(sweep.search[key]).items():
            axes.annotate(
                text,
                (place, at),
                xytext=(4, 0),
                textcoords="offset points",
                fontsize=8,
                va="center",
            )
    axes.axvline(len(keys), color="0.7", zorder=0)
    for at in (0.0, 0.5, 1.0):
        label = f"{low + at * (high - low):.4f}"
        axes.annotate(
            label,
            (len(keys), at),
            xytext=(4, 0),
            textcoords="offset points",
            fontsize=8,
            va="center",
        )
    axes.set_xticks(range(len(keys) + 1), [*(short(key) for key in keys), sweep.metric])
    axes.set_yticks([])
    axes.set_xlim(-0.15, len(keys) + 0.35)
    axes.set_ylim(-0.05, 1.05)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_title(f"{sweep.name}: one line a trial, dashed where stopped early")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def effects(
    sweep: SweepConfig, grouped: Mapping[str, Mapping[str, Sequence[Trial]]], epoch: int, path: Path
) -> None:
    """One panel a field: each trial's objective after ``epoch`` epochs over its value, and the mean of each value."""
    figure = Figure(figsize=(max(5.0, 3.4 * len(grouped)), 4))
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(grouped), sharey=True, squeeze=False)[0]
    for panel, (key, parts) in zip(panels, grouped.items()):
        for place, some in enumerate(parts.values()):
            points = [
                max(v.metrics[sweep.metric_name] for v in t.validations() if v.epoch <= epoch)
                for t in some
            ]
            spread = np.linspace(-0.12, 0.12, len(points)) if len(points) > 1 else [0.0]
            panel.plot([place + s for s in spread], points, "o", color=colour(0.4), alpha=0.7)
            panel.plot(
                [place - 0.25, place + 0.25], [np.mean(points)] * 2, color=colour(1.0), linewidth=2
            )
        panel.set_xticks(range(len(parts)), list(parts), rotation=30, ha="right", fontsize=8)
        panel.set_title(short(key))
        panel.grid(axis="y", color="0.9")
    panels[0].set_ylabel(f"{sweep.metric} after {epoch} epochs")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def colour(shade: float) -> tuple[float, float, float]:
    """From grey (0) to blue (1)."""
    return (0.75 - 0.63 * shade, 0.75 - 0.28 * shade, 0.75 - 0.04 * shade)
