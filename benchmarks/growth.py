"""How the cost of a training step grows: with the sequences of a batch, items, V, K, tables, D_m.

From one base (SASRec of two layers, d = 64, histories of 20 items or so, two tables, one thread),
each size takes four values that go up by fours (tables: by twos), the others staying. Measured are
the processor time of an update with a shortlist, of one that searches every token, and of a refresh
of the shortlist, and how much memory each run adds at most to what its process had before. Data
and tables are random.

A line through the logarithms has the slope 1 where a cost is linear, less where a part of it does
not grow. As that part hides what grows faster, the slope between the two largest sizes, where it
weighs least, is given beside it. What exceeds 1.15 in either is above linear, and the exit code 1.

    python benchmarks/growth.py --json growth.json --plot docs/images/growth.png
    python benchmarks/growth.py --only V K
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

if __package__:
    from benchmarks.gpu import write_interactions
else:
    from gpu import write_interactions

from support import REPOSITORY, write_table

from mltfr_dist.config import RunConfig
from mltfr_dist.distributed.engine import Engine, batch_layout
from mltfr_dist.distributed.meeting import start_ranks
from mltfr_dist.distributed.resources import forget_peak_memory, peak_memory_bytes
from mltfr_dist.schema import validate
from mltfr_dist.training.build import build_model
from mltfr_dist.training.inputs import load_inputs
from mltfr_dist.training.streams import train_stream

BASE = {"sequences": 64, "items": 4096, "V": 8192, "K": 16, "tables": 2, "D_m": 64}
SIZES = {
    "sequences": (16, 64, 256, 1024),
    "items": (1024, 4096, 16_384, 65_536),
    "V": (8192, 32_768, 131_072, 524_288),
    "K": (4, 16, 64, 256),
    "tables": (1, 2, 4, 8),
    "D_m": (64, 256, 1024, 4096),
}
SHORTLIST = 2048
USERS, PER_USER = 4096, 20.0
STEPS = 2
"""Batches that are stepped on, each as often as ``fastest`` says."""
LINEAR = 1.15
"""Slopes up to this are called linear: repeated runs on a shared machine differ by as much."""


def slopes(sizes: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    """Exponents of growth: of the line through all logarithms, and of that through the last two."""
    x, y = np.log(sizes), np.log(costs)
    return float(np.polyfit(x, y, 1)[0]), float((y[-1] - y[-2]) / (x[-1] - x[-2]))


def above_linear(result: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Which costs grow faster than linearly, and how."""
    return [
        f"{what} by {size} ({said(curve)})"
        for size, curves in result.items()
        for what, curve in curves.items()
        if max(curve["slopes"]) > LINEAR
    ]


def said(curve: dict[str, Any]) -> str:
    """Both slopes."""
    whole, last = curve["slopes"]
    return f"{whole:.2f}, at the end {last:.2f}"


class Inputs:
    """Data and tables of each size, made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def data(self, items: int) -> Path:
        """Prepared interactions with so many items."""
        folder = self.folder / f"items-{items}"
        if not folder.exists():
            write_interactions(folder, users=USERS, items=items, per_user=PER_USER)
        return folder / "data"

    def table(self, rows: int, dim: int, seed: int) -> Path:
        """A token table."""
        name = f"table-{rows}-{dim}-{seed}"
        if not (self.folder / name).exists():
            write_table(self.folder, name, num_rows=rows, dim=dim, seed=seed)
        return self.folder / name


def config_for(inputs: Inputs, sizes: dict[str, int], *, exact: bool) -> RunConfig:
    """A run of those sizes."""
    tables = [inputs.table(sizes["V"], sizes["D_m"], m) for m in range(sizes["tables"])]
    values = {
        "data": {"path": str(inputs.data(sizes["items"])), "max_len": 50},
        "backbone": {"hidden_dim": 64, "num_heads": 2, "dropout": 0.2},
        "mltfr": {
            "tables": list(map(str, tables)),
            "filter": {"top_k": sizes["K"], "shortlist_size": None if exact else SHORTLIST},
        },
        "training": {"global_batch_size": sizes["sequences"]},
        "deepspeed": str(REPOSITORY / "ds_configs" / "zero1.json"),
    }
    return validate(RunConfig, values, source="the benchmark")


def fastest(work: Callable[[], object], rounds: int = 4, enough: float = 0.8) -> float:
    """Processor seconds of ``work`` at best, of as many ``rounds`` and ``enough`` seconds at
    least.
    """
    taken: list[float] = []
    while len(taken) < rounds or sum(taken) < enough:
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return min(taken)


def measure(config: RunConfig) -> dict[str, float]:
    """Of a run, in this process: seconds of an update and of a refresh, MiB added at most."""
    ranks = start_ranks(1)
    layout = batch_layout(config, ranks)
    batches = list(islice(train_stream(config, layout).epoch(0), STEPS))
    inputs = load_inputs(config, verify=False)
    before = psutil.Process().memory_info().rss
    forget_peak_memory()
    engine = Engine(
        build_model(config, inputs, ranks, with_consensus=False), config, ranks, layout, 1
    )
    engine.deepspeed.train()

    def refresh() -> None:
        engine.module.before_update(0, batches[0].micro_batches, ranks)

    refresh()
    for step, of_step in enumerate(batches):
        engine.update(of_step, step)
    seconds = [fastest(lambda: engine.update(of_step, 0)) for of_step in batches]  # noqa: B023
    result = {"step": sum(seconds) / STEPS, "memory": (peak_memory_bytes() - before) / 2**20}
    return result | ({"refresh": fastest(refresh)} if config.mltfr.filter.shortlist_size else {})


def in_child(config: RunConfig) -> dict[str, float]:
    """:func:`measure` in a process of its own, whose memory nothing else has touched."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(measure, (config,))


def curves_of(inputs: Inputs, size: str, known: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Costs over the values of one size; points in ``known`` are not measured again."""
    costs: dict[str, list[float]] = {}
    for value in SIZES[size]:
        sizes = BASE | {size: value}
        for search in ("shortlist", "exact"):
            key = f"{search} {sizes}"
            if key not in known:
                known[key] = in_child(config_for(inputs, sizes, exact=search == "exact"))
            for what, cost in known[key].items():
                name = what if what == "refresh" else f"{what}, {search}"
                costs.setdefault(name, []).append(cost)
        print(
            f"  {size} {value}: " + ", ".join(f"{k} {c[-1]:.3g}" for k, c in costs.items()),
            flush=True,
        )
    values = SIZES[size]
    return {
        name: {"sizes": values, "costs": result, "slopes": slopes(values, result)}
        for name, result in costs.items()
    }


def draw(result: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """Time above, memory below, a column a size."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(
        2, len(result), figsize=(2.6 * len(result), 5.4), layout="constrained", squeeze=False
    )
    for column, (size, curves) in zip(axes.T, result.items()):
        for name, curve in curves.items():
            axis = column[int(name.startswith("memory"))]
            label = f"{name.split(', ')[-1]}: {said(curve)}"
            axis.loglog(curve["sizes"], curve["costs"], marker="o", markersize=3, label=label)
        column[0].set_title(size)
        for axis in column:
            axis.set_xticks(SIZES[size], [f"{value:,}" for value in SIZES[size]], fontsize=6)
            axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter("{x:g}")
            axis.yaxis.set_minor_formatter(ticker.NullFormatter())
            axis.minorticks_off()
            axis.legend(fontsize=6, frameon=False)
    axes[0, 0].set_ylabel("processor seconds")
    axes[1, 0].set_ylabel("MiB added at most")
    figure.savefig(path, dpi=110)


def main() -> int:
    """Measure, print, write; exit code 1 where a cost grows faster than linearly."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    import deepspeed  # noqa: F401  (once, and not in each child)

    result, known = dict[str, Any](), dict[str, dict[str, float]]()
    with tempfile.TemporaryDirectory() as temporary:
        inputs = Inputs(Path(temporary))
        for size in options.only:
            result[size] = curves_of(inputs, size, known)
            for name, curve in result[size].items():
                print(f"{size:10} {name:18} {said(curve)}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot:
        draw(result, options.plot)
    above = above_linear(result)
    print("Above linear: " + ("; ".join(above) if above else "nothing"))
    return int(bool(above))


if __name__ == "__main__":
    sys.exit(main())
