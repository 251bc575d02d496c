"""The authors' own setting, end to end: what the published procedure reports, and of what that is
made.

Preset `paper` on the data that the authors use, split as they do, in three arms: MLTFR over the
token tables (trained, as theirs are), the same over random rows of equal mean and covariance, and
the bare backbone for the epochs of both stages. The consensus merges a group of two equally wide
tables: `minilm`, and the leading principal components of `smollm2`, as many. Each arm runs twice:

- as published: trained on the validation targets too, the best of all epochs by the test split;
- with the choice by the validation split, which is then not trained on.

The first run's curve has the test figures of every epoch, so also of the epoch that the second
would choose: their difference is what the choice on the test split adds, all else being equal.

    python benchmarks/published_setting.py --data data/lastfm data/pantry
    # of the runs that are there: the table of docs/results.md
    python benchmarks/published_setting.py --data data/lastfm data/pantry --report

Interrupted, it goes on: finished rows are skipped, a started run resumes. Some 40 minutes of one
core for a run of MLTFR on LastFM, 10 times as much on Pantry.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mltfr_dist.config import RunConfig
from mltfr_dist.errors import MltfrError, fail
from mltfr_dist.presets import preset
from mltfr_dist.repairs import as_published
from mltfr_dist.tables.store import load_table, save_table

if __package__:
    from benchmarks.quality import bare, random_tables, run_missing, vary
else:
    from quality import bare, random_tables, run_missing, vary

BACKBONES: dict[str, dict[str, Any]] = {
    "sasrec_original": {},
    "bsarec": {"published.double_softmax": True, "mltfr.consensus.weight": 0.1},
}
"""The authors' own forms, and what they set beside them."""
ARMS: dict[str, Callable[[RunConfig], RunConfig]] = {
    "bare": lambda base: bare(vary(base, {"mltfr.filter.top_k": 2})),  # 1 is MLTFR's alone
    "paper": lambda base: base,
    "paper_random_tables": random_tables,
}
BY_VALIDATION = {"published.pick_on_test": False, "published.train_on_validation": False}
ADDED = "_by_validation"
OF_A_FILE = {
    *("schema_version", "num_rows", "dim", "info_sha256"),
    *("table_sha256", "rows_sha256", "vocabulary_sha256"),
}
"""What a table's description says of the stored file alone."""
METRICS = ("HR@10", "NDCG@10", "HR@20", "NDCG@20")


class Task(NamedTuple):
    """One run."""

    arm: str
    config: RunConfig


def narrowed(tables: Path, output: Path) -> Path:
    """`smollm2` as wide as `minilm`: its leading principal components, scaled to a mean square of
    1.
    """
    wide, other = load_table(tables / "smollm2"), load_table(tables / "minilm")
    width, name = other.rows.shape[1], "smollm2_narrow"
    if not (output / name).exists():
        rows = wide.rows - wide.rows.mean(0)
        _, axes = torch.linalg.eigh((rows.T @ rows).double())  # ascending
        rows = rows @ axes[:, -width:].flip(1).float()
        rows = rows / rows.square().mean().sqrt()
        described = wide.info.model_dump() | {"name": name}
        fields = {key: value for key, value in described.items() if key not in OF_A_FILE}
        save_table(output, rows.contiguous(), wide.vocabulary, **fields)
    return output / name


def base_config(data: Path, backbone: str, tables: tuple[Path, ...], seed: int) -> RunConfig:
    """The authors' setting over these data."""
    fields = {
        "data.path": str(data),
        "backbone.name": backbone,
        "mltfr.tables": [str(path) for path in tables],
        "mltfr.consensus.group": [path.name for path in tables[1:]],
        "training.seed": seed,
        "training.threads": 1,
    }
    config = as_published(vary(preset("paper"), fields))
    return vary(config, BACKBONES[backbone])


def plan(options: argparse.Namespace) -> Iterator[Task]:
    """All runs: those of a data set and a backbone before the next."""
    narrow = narrowed(options.tables, options.runs / "tables")
    tables = (options.tables / "llama2", options.tables / "minilm", narrow)
    for seed in options.seeds:
        for data in options.data:
            for backbone in options.backbones:
                base = base_config(data, backbone, tables, seed)
                for added, fields in (("", {}), (ADDED, BY_VALIDATION)):
                    for arm, made in ARMS.items():
                        label = f"{data.name}-{backbone}-{arm}{added}-{seed}"
                        update = {"name": label, "runs_dir": options.runs, "baselines": ()}
                        config = vary(made(base), fields).model_copy(update=update)
                        yield Task(f"{arm}{added}", config)


def curve(folder: Path, kind: str) -> list[dict[str, float]]:
    """The metrics of every epoch of a run, both stages in one."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [entry for line in lines if (entry := json.loads(line))["kind"] == kind]


def first_best(values: Sequence[dict[str, float]], metric: str) -> int:
    """Where the metric is highest first."""
    return max(range(len(values)), key=lambda i: (values[i][metric], -i))


def report(tasks: Sequence[Task]) -> Iterator[str]:
    """A line for each arm that has both runs."""
    shown = " / ".join(METRICS)
    yield (
        f"| data, backbone, seed | arm | test picks: {shown} (epoch) | epoch that validation picks "
        "| last epoch | trained without validation targets |"
    )
    yield "|---|---|---|---|---|---|"
    folders = {task.config.name: task.config.folder for task in tasks}
    for theirs in (task for task in tasks if not task.arm.endswith(ADDED)):
        name = theirs.config.name
        folder, twin = folders[name], folders[name.replace(theirs.arm, f"{theirs.arm}{ADDED}")]
        if not all((f / "result.json").exists() for f in (folder, twin)):
            continue
        by_test, by_validation = curve(folder, "picked_on_test"), curve(twin, "valid")
        metric = theirs.config.evaluation.select_by
        epochs = {
            "test": first_best(by_test, metric),
            "valid": min(first_best(by_validation, metric), len(by_test) - 1),
            "last": len(by_test) - 1,
        }
        own = json.loads((twin / "result.json").read_text())["test"]
        cells = [
            " / ".join(f"{by_test[i][m]:.4f}" for m in METRICS) + f" ({i + 1})"
            for i in epochs.values()
        ]
        cells.append(" / ".join(f"{own[m]:.4f}" for m in METRICS))
        label = name.replace(f"-{theirs.arm}", "")
        yield f"| {label} | {theirs.arm} | {' | '.join(cells)} |"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, nargs="+", default=[Path("data/pantry")])
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tables", type=Path, default=Path("data/tables"), help="folder of them")
    parser.add_argument("--runs", type=Path, default=Path("runs/published"), help="of the runs")
    parser.add_argument("--matrix", type=Path, help="rows (default: RUNS/published.parquet)")
    parser.add_argument("--report", action="store_true", help="of what is there; nothing runs")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing; returns the exit code."""
    options = build_parser().parse_args(arguments)
    try:
        tasks = list(plan(options))
        if options.report:
            print("\n".join(report(tasks)))
            return 0
        matrix = options.matrix or options.runs / "published.parquet"
        return 0 if run_missing(matrix, tasks, [sys.executable], jobs=1) else 1
    except MltfrError as error:
        return fail(error)


if __name__ == "__main__":
    sys.exit(main())
