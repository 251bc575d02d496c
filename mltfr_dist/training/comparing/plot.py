"""Differences with their intervals, as a PNG: all users first, then slices of them."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mltfr_dist.files import replacing
from mltfr_dist.training.comparing.compare import Comparison


def write_plot(path: Path, comparison: Comparison) -> None:
    """One panel a model: the difference to the reference over all users and by slice."""
    metric, panels = comparison.options.metric, len(comparison.differences)
    lines = 1 + max(len(one.slices) for one in comparison.differences)
    figure = Figure(figsize=(7.6, panels * (0.9 + 0.32 * lines) + 0.4), dpi=120)
    FigureCanvasAgg(figure)
    for number, one in enumerate(comparison.differences, 1):
        axes = figure.add_subplot(panels, 1, number)
        changes = [one.changes[metric], *(user_slice.change for user_slice in one.slices)]
        names = ["all users", *(user_slice.name for user_slice in one.slices)]
        for row, change in enumerate(changes):
            colour = "#1f4e79" if row == 0 else "#7f9db9"
            axes.plot([change.low, change.high], [row, row], color=colour, linewidth=2)
            axes.plot([change.difference], [row], "o", color=colour, markersize=6)
        axes.axvline(0, color="0.4", linewidth=1)
        if comparison.options.margin is not None:
            axes.axvspan(
                -comparison.options.margin, comparison.options.margin, color="0.93", zorder=0
            )
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.grid(axis="x", color="0.9")
        axes.set_title(f"{one.model} minus {comparison.reference}", fontsize=10)
        axes.set_xlabel(f"{metric}, {comparison.split} split, 95% interval")
    figure.tight_layout()
    with replacing(path) as partial:
        figure.savefig(partial, format="png")
