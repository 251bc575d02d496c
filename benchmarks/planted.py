"""Would this harness see a gain if there were one? Worlds in which token tables do, or do not,
decide what comes next.

A world has items named by two words each, every word a token of a real table and none used twice,
so that items share nothing but the geometry of their tokens. Users walk through the items. With
probability `dial` the next item follows the geometry: a softmax over STRENGTH times the cosine of
the two names' features. Otherwise it follows what the table knows nothing of: one of the item's own
few successors, drawn at random once, or popularity. Dial 0 links tokens and walks by nothing; at
dial 1 they are all that counts.

In each world the arms of benchmarks/quality.py are trained with equal budgets, and compared, paired
by seed (a seed draws the world and the model): does `grounded` beat `grounded_random` and `bare`,
as it must? Does MLTFR without item text beat itself over random tables in a world made of the
table? At which dial does each become visible, and how small a difference could the design have
shown?

    python benchmarks/planted.py --tables data/tables/llama2 --seeds 0 1 2 3 4 --jobs 2
    # of the rows that are there: table, JSON and plot
    python benchmarks/planted.py --report

Interrupted, it goes on: finished rows are skipped, a started run resumes.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mltfr_dist.config import RunConfig
from mltfr_dist.errors import DataError, MltfrError, fail
from mltfr_dist.resolve import resolve_config
from mltfr_dist.statistics.power import detectable
from mltfr_dist.statistics.spread import seeds_alone
from mltfr_dist.tables.store import TokenTable, load_table
from mltfr_dist.tables.titles import title_features
from mltfr_dist.training.reporting.matrix import (
    Row,
    interval,
    read_rows,
)

if __package__:
    from benchmarks import quality
else:
    import quality

STRENGTH = 20.0
"""Factor on the cosine in the softmax of a step by geometry: about four tenths of the weight lie on
ten items.
"""
SUCCESSORS = 5
ARMS = ("bare", "grounded", "grounded_random", "repaired", "random_tables")
DIALS = (0.0, 0.25, 0.5, 0.75, 1.0)
WORD = re.compile(r" [a-z]{3,}")
METRIC = "test/NDCG@10"
COMPARISONS = (
    ("grounded", "grounded_random"),
    ("grounded", "bare"),
    ("repaired", "random_tables"),
    ("repaired", "bare"),
)
SETTINGS = {
    "data.max_len": 20,
    "training.global_batch_size": 128,
    "training.epochs": 25,
    "training.patience": 5,
    "training.threads": 1,
    "mltfr.consensus.enabled": False,
    "baselines": [],
}
"""Of every arm. One table needs no consensus, and so there is one stage."""


@dataclass(frozen=True)
class World:
    """Walks of users over named items."""

    titles: list[str]
    """Of items 0..I-1."""
    walks: list[NDArray[np.int64]]
    """Of each user, oldest first; no item twice."""


def make_world(
    table: TokenTable, dial: float, seed: int, *, items: int = 2_500, users: int = 2_500
) -> World:
    """A world, the same for the same arguments.

    Args:
        table: Its tokens name the items, two to each, none twice.
        dial: Probability that a step follows the geometry of the names.
        seed: Of names, successors, popularity and walks.
        items: I.
        users: Each walks 5 to 10 items.

    Raises:
        DataError: The table has too few whole words.
    """
    random = np.random.default_rng([seed, round(dial * 1e6)])
    names = np.random.default_rng(seed)  # the same names, successors and popularity at any dial
    words = sorted({t.strip() for t in table.vocabulary if WORD.fullmatch(t)})
    if len(words) < 2 * items:
        raise DataError(
            f"{table.name} holds {len(words):,} whole words; {2 * items:,} are needed.",
            rule="Each item is named by two words of its own.",
            remedy="Give another table, or fewer --items.",
        )
    chosen = names.choice(len(words), (items, 2), replace=False)
    titles = [f"{words[a]} {words[b]}" for a, b in chosen]
    features = title_features([None, *titles], table)[1:].numpy().astype(np.float64)
    near = np.exp(STRENGTH * (features @ features.T))
    np.fill_diagonal(near, 0.0)
    successors = np.argsort(names.random((items, items)), axis=1)[:, :SUCCESSORS]
    popularity = 1.0 / np.arange(1, items + 1) ** 0.7
    popularity = popularity[names.permutation(items)] / popularity.sum()
    near /= near.sum(1, keepdims=True)
    own = np.zeros((items, items))
    np.put_along_axis(own, successors, 0.5 / SUCCESSORS, axis=1)
    step = dial * near + (1 - dial) * (own + 0.5 * popularity)
    return World(titles, [walk(step, popularity, random) for _ in range(users)])


def walk(
    step: NDArray[np.float64], start: NDArray[np.float64], random: np.random.Generator
) -> NDArray[np.int64]:
    """One user's items: the first by ``start`` [I], each next by the row of ``step`` [I, I], none
    twice.
    """
    path = [int(random.choice(len(start), p=start))]
    for _ in range(int(random.integers(4, 10))):
        chances = step[path[-1]].copy()
        chances[path] = 0.0
        path.append(int(random.choice(len(start), p=chances / chances.sum())))
    return np.array(path)


def prepared(root: Path, name: str, make: Callable[[], World]) -> Path:
    """The prepared data of a world, made unless it is there, by the command that a user would
    give.
    """
    data, raw = root / "data" / name, root / "raw" / name
    if not data.exists():
        world = make()
        raw.mkdir(parents=True, exist_ok=True)
        walks, titles = raw / "walks.txt", raw / "titles.csv"
        lines = (" ".join(map(str, (user, *path))) for user, path in enumerate(world.walks))
        walks.write_text("\n".join(lines) + "\n")
        with titles.open("w", newline="") as file:
            csv.writer(file).writerows([("item_id", "title"), *enumerate(world.titles)])
        command = [
            *(sys.executable, "-m", "mltfr_dist", "prepare", str(walks), str(data)),
            *("--format", "sequences", "--user-core", "1", "--item-core", "1"),
            *("--titles", str(titles)),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return data


def world_name(dial: float, seed: int) -> str:
    """The name of a world's data set, from which its dial can be read again."""
    return f"dial{dial:.2f}-world{seed}"


def plan(options: argparse.Namespace) -> list[tuple[str, RunConfig]]:
    """Every arm of every world, a seed's before the next seed's, so that any prefix can be
    compared.

    Worlds that are not there yet are made.
    """
    tables = [load_table(path) for path in options.tables]
    base = quality.vary(
        resolve_config("demo", None, options.overrides),
        SETTINGS | {"mltfr.tables": [str(path) for path in options.tables]},
    )
    base = quality.vary(base, dict(item.split("=", 1) for item in options.overrides))
    runs = []
    for seed, dial in product(options.seeds, options.dials):
        make = partial(make_world, tables[0], dial, seed, items=options.items, users=options.users)
        data = prepared(options.worlds, world_name(dial, seed), make)
        for name in options.variants:
            fields = {"data.path": str(data), "training.seed": seed}
            config = quality.variant(name)(quality.vary(base, fields))
            named = {"name": f"{data.name}-{name}", "runs_dir": options.worlds / "runs"}
            runs.append((name, config.model_copy(update=named)))
    return runs


def paired(rows: Sequence[Row], dial: float, arm: str, reference: str) -> list[float]:
    """Differences in the metric, one for each seed that both arms have."""
    result = {(row["variant"], row["seed"]): row[METRIC] for row in rows if row["dial"] == dial}
    return [
        value - result[reference, seed]
        for (name, seed), value in sorted(result.items())
        if name == arm and (reference, seed) in result
    ]


def report(options: argparse.Namespace) -> None:
    """Print, write and draw the curves of the rows that are there."""
    rows = read_rows(options.matrix)
    for row in rows:
        result = re.fullmatch(r"dial(.*)-world\d+", row["dataset"])
        row["dial"] = float(result[1]) if result else math.nan
    dials = sorted({row["dial"] for row in rows})
    curves = []
    for dial in dials:
        arms = {
            arm: interval([r[METRIC] for r in rows if (r["dial"], r["variant"]) == (dial, arm)])
            for arm in dict.fromkeys(row["variant"] for row in rows if row["dial"] == dial)
        }
        compared = {}
        for arm, reference in COMPARISONS:
            if values := paired(rows, dial, arm, reference):
                mean, half = interval(values)
                result = seeds_alone(np.array(values))
                shown = detectable(result.error, result.freedom) if len(values) > 1 else math.nan
                compared[f"{arm} - {reference}"] = {
                    "seeds": len(values),
                    "difference": mean,
                    "half_width": half,
                    "detectable": shown,
                }
        curves.append({"dial": dial, "arms": arms, "differences": compared})
    for curve in curves:
        print(f"\ndial {curve['dial']:.2f}: {METRIC}")
        for arm, (mean, half) in curve["arms"].items():
            print(f"  {arm:32} {mean:.4f} +- {half:.4f}")
        for name, values in curve["differences"].items():
            print(
                f"  {name:32} {values['difference']:+.4f} +- {values['half_width']:.4f}"
                f"   {values['seeds']} seeds could show {values['detectable']:.4f}"
            )
    options.json.write_text(json.dumps(curves, indent=1) + "\n")
    draw(curves, options.plot)


def draw(curves: Sequence[dict[str, Any]], path: Path) -> None:
    """Arms and differences over the dial, side by side."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for axis, key in ((left, "arms"), (right, "differences")):
        for name in dict.fromkeys(name for curve in curves for name in curve[key]):
            points = [(c["dial"], c[key][name]) for c in curves if name in c[key]]
            means = [v["difference"] if key == "differences" else v[0] for _, v in points]
            halves = [v["half_width"] if key == "differences" else v[1] for _, v in points]
            axis.errorbar([d for d, _ in points], means, halves, capsize=3, marker="o", label=name)
        axis.set_xlabel("dial: share of steps that follow the tokens' geometry")
        if axis.has_data():
            axis.legend(frameon=False, fontsize=8)
    left.set_ylabel("test NDCG@10, mean and 95% interval over seeds")
    right.set_ylabel("paired difference")
    right.axhline(0, color="black", linewidth=0.8)
    figure.savefig(path, dpi=110)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--matrix", type=Path, default=Path("planted.parquet"), help="file that rows are added to")
    add("--json", type=Path, default=Path("planted.json"), help="file of the curves")
    add("--plot", type=Path, default=Path("planted.png"), help="picture of the curves")
    add("--worlds", type=Path, default=Path("runs/planted"), help="folder of worlds and runs")
    add(
        "--tables",
        type=Path,
        nargs="+",
        default=[Path("data/tables/llama2")],
        help="the first names the items and sets the geometry; MLTFR reads them all",
    )
    add("--variants", nargs="+", default=ARMS, help=f"default: {', '.join(ARMS)}")
    add("--dials", type=float, nargs="+", default=DIALS)
    add("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    add("--items", type=int, default=2_500)
    add("--users", type=int, default=2_500)
    add("--jobs", type=int, default=1, help="runs side by side, a thread each (default: 1)")
    add("--launcher", default=sys.executable, help="what starts train.py (default: this Python)")
    add("--set", nargs="+", metavar="KEY=VALUE", default=[], dest="overrides")
    add("--report", action="store_true", help="train nothing; report the rows that are there")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Train what is missing and report; returns the exit code."""
    options = build_parser().parse_args(arguments)
    try:
        complete = options.report or quality.run_missing(
            options.matrix, plan(options), shlex.split(options.launcher), options.jobs
        )
        report(options)
    except MltfrError as error:
        return fail(error)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
