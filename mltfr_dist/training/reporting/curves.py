"""Training loss and validation metric over the updates, as a PNG."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mltfr_dist.files import replacing
from mltfr_dist.training.run_folder import STAGES

CURVES = "curves.png"
"""In a run's folder."""

Points = list[tuple[int, float]]


def write_curves(path: Path, records: Mapping[str, Path], metric: str) -> None:
    """Draw the records (`metrics.jsonl`) of runs into one picture.

    Args:
        path: The PNG.
        records: Name to record.
        metric: The metric of the validations.
    """
    figure = Figure(figsize=(9.6, 3.6), dpi=110)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for name, record in records.items():
        losses, validations, begins = read_curves(record, metric)
        left.plot(*zip(*losses, strict=True) if losses else ([], []), label=name, linewidth=1)
        right.plot(*zip(*validations, strict=True) if validations else ([], []), "o-", label=name)
        for axes in (left, right) if begins else ():
            axes.axvline(begins, color="0.7", linestyle=":")
    for axes, title in ((left, "training loss (nats)"), (right, f"validation {metric}")):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("updates")
        axes.grid(color="0.9")
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.tight_layout()
    with replacing(path) as partial:
        figure.savefig(partial, format="png", metadata={"Software": None})


def read_curves(record: Path, metric: str) -> tuple[Points, Points, int]:
    """Losses and validations at the updates of the whole run.

    Returns:
        (update, value) of each, and the update at which stage 2 begins; 0 where there is none.
    """
    losses: Points = []
    validations: Points = []
    last = base = 0
    for text in record.read_text().splitlines():
        line = json.loads(text)
        if line["stage"] == STAGES[1] and not base:
            base = last
        at = base + line["step"]
        if line["kind"] == "step" and "loss" in line:
            losses.append((at, line["loss"]))
        elif line["kind"] in ("valid", "picked_on_test") and metric in line:
            validations.append((at, line[metric]))
        last = max(last, at)
    return losses, validations, base
