"""PNG plots of a prepared folder: both axes logarithmic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def line_plot(
    path: Path, x: np.ndarray, y: np.ndarray, title: str, x_label: str, y_label: str
) -> None:
    """Positive values ``y`` [n] over positive ``x`` [n], written to ``path``."""
    figure = Figure(figsize=(7.2, 4.4), dpi=100)
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.loglog(x, y, marker="o" if len(x) <= 2000 else "", markersize=3)
    axes.grid(color="0.9")
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    figure.tight_layout()
    figure.savefig(path)
