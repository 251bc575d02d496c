"""Does MLTFR help? A matrix of runs over data sets, backbones, variants and seeds, one row a run in
a Parquet file.

Every arm has the same loss, budget of epochs and stopping rule; it differs from the base
configuration in what its function below changes, and in nothing else. Each run is a process of its
own, by the command a user would give. Baselines that need no training (`--baselines`) have a row
for each data set, whatever variants are asked for. Interrupted, the matrix goes on: finished rows
are skipped, a started run resumes.

    python benchmarks/quality.py matrix.parquet --data data/ml-100k --seeds 0 1 2 3 4
    python benchmarks/quality.py matrix.parquet --variants bare repaired \
        --set training.epochs=20 optimizer.max_grad_norm=1
    mltfr report matrix.parquet
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Event, Lock
from typing import Any

import torch

from mltfr_dist import repairs
from mltfr_dist.baselines import BASELINES
from mltfr_dist.config import RunConfig
from mltfr_dist.config.published import CONSENSUS, MLTFR, PER_USER, USER_GUIDED, without
from mltfr_dist.data.shards.manifest import load_manifest
from mltfr_dist.distributed.ranks import ALONE
from mltfr_dist.errors import ConfigError, MltfrError, fail
from mltfr_dist.repairs import REPAIRS, as_published
from mltfr_dist.resolve import resolve_config
from mltfr_dist.schema import changed, or_nearest
from mltfr_dist.tables.store import load_table
from mltfr_dist.training.build import model_spec
from mltfr_dist.training.evaluating.compare import baseline_result
from mltfr_dist.training.inputs import load_inputs
from mltfr_dist.training.reporting.matrix import USUAL, append_row, is_done, make_row, read_rows
from mltfr_dist.training.run_folder import CONFIG, RANKS, Result, claim, load_result

ROOT = Path(__file__).resolve().parent.parent
Variant = Callable[[RunConfig], RunConfig]
PARAMETER_TOLERANCE = 0.02


def vary(config: RunConfig, fields: dict[str, Any]) -> RunConfig:
    """``config`` with dotted fields changed."""
    return changed(config, fields, source="a variant")


def one_stage(config: RunConfig) -> RunConfig:
    """The epochs of both stages in one."""
    if config.mltfr.consensus.enabled:
        config = vary(
            config, {"training.epochs": config.training.epochs + config.training.consensus_epochs}
        )
    return config


def bare(base: RunConfig) -> RunConfig:
    """The backbone alone."""
    return vary(one_stage(base), without(MLTFR) | {"mltfr.enabled": False})


def bare_equal_parameters(base: RunConfig) -> RunConfig:
    """The backbone alone, so wide that it has as many parameters as the model with MLTFR."""
    wanted, alone = num_parameters(base), bare(base)
    heads = base.backbone.num_heads
    widths = range(base.backbone.hidden_dim, 16 * base.backbone.hidden_dim, heads)
    sizes = {width: num_parameters(vary(alone, {"backbone.hidden_dim": width})) for width in widths}
    best = min(sizes, key=lambda width: abs(sizes[width] - wanted))
    if abs(sizes[best] - wanted) > PARAMETER_TOLERANCE * wanted:
        raise ConfigError(
            f"No hidden_dim gives the bare backbone {wanted:,} parameters; the nearest, {best}, "
            f"gives {sizes[best]:,}.",
            rule=f"The arms' parameters agree within {PARAMETER_TOLERANCE:.0%}.",
            remedy="Leave out the variant bare_equal_parameters, or change backbone.hidden_dim or "
            "num_heads.",
        )
    return vary(alone, {"backbone.hidden_dim": best})


def group_of_one_width(base: RunConfig) -> dict[str, Any]:
    """What the published consensus can merge: the largest group of equally wide tables among those
    given.
    """
    stored = [load_table(path) for path in base.mltfr.tables]
    widths = [table.rows.shape[1] for table in stored]
    width = max(widths, key=lambda w: (widths.count(w), -widths.index(w)))
    return {
        "mltfr.consensus.group": [
            table.name for table, w in zip(stored, widths, strict=True) if w == width
        ]
    }


def paper(base: RunConfig) -> RunConfig:
    """MLTFR as published. The backbone, the loss and the protocol stay those of the other arms."""
    return as_published(vary(base, group_of_one_width(base)), scopes=["method"])


def paper_frozen_tables(base: RunConfig) -> RunConfig:
    """As published but for the tables, which stay frozen, as its description (not its code) has it;
    much cheaper.
    """
    return vary(paper(base), {"published.trained_tables": False})


def without_repair(base: RunConfig, name: str) -> RunConfig:
    """One repair taken away, of MLTFR or of the backbone."""
    base = vary(base, group_of_one_width(base)) if name == "shared_core" else base
    return repairs.without(base, name)


def repaired(base: RunConfig) -> RunConfig:
    """MLTFR as configured."""
    return base


def random_tables(base: RunConfig) -> RunConfig:
    """Normal rows of equal mean and covariance in place of the tables'."""
    return vary(base, {"mltfr.table_content": "random"})


def shuffled_tables(base: RunConfig) -> RunConfig:
    """Each column of the tables permuted by itself."""
    return vary(base, {"mltfr.table_content": "shuffled"})


def random_tokens(base: RunConfig) -> RunConfig:
    """As many tokens of the real tables, drawn for each history by a hash of it."""
    return vary(base, without(USER_GUIDED) | {"mltfr.filter.strategy": "random_tokens"})


def learned_prototypes(base: RunConfig) -> RunConfig:
    """Rows that a perceptron makes of each table, the same for every user."""
    fields = without(USER_GUIDED, PER_USER) | {"mltfr.filter.strategy": "learned_prototypes"}
    return vary(base, fields)


def one_table(base: RunConfig) -> RunConfig:
    """The first table alone."""
    return vary(base, {"mltfr.tables": [str(base.mltfr.tables[0])]})


def consensus_off(base: RunConfig) -> RunConfig:
    """One stage of as many epochs, and so without the fresh optimizer that stage 2 also brings."""
    return vary(one_stage(base), without(CONSENSUS) | {"mltfr.consensus.enabled": False})


def consensus_zero(base: RunConfig) -> RunConfig:
    """Both stages, but the consensus expert adds nothing: what stage 2 gives by itself."""
    return vary(base, {"mltfr.consensus.weight": 0.0})


def grounded(base: RunConfig) -> RunConfig:
    """Each item carries its title's tokens: the positive control, which reads item text as the
    method does not.
    """
    return vary(base, {"mltfr.item_tokens.source": "titles"})


def grounded_random(base: RunConfig) -> RunConfig:
    """Each item carries its title's tokens, whose rows are random: what shared words give without
    their content.
    """
    return random_tables(grounded(base))


VARIANTS: dict[str, Variant] = {
    f.__name__: f
    for f in (
        bare,
        bare_equal_parameters,
        paper,
        paper_frozen_tables,
        repaired,
        random_tables,
        shuffled_tables,
        random_tokens,
        learned_prototypes,
        one_table,
        consensus_off,
        consensus_zero,
        grounded,
        grounded_random,
    )
}
CONTROLS = [name for name in VARIANTS if name != "paper" and not name.startswith("grounded")]
"""What is run unless said otherwise: not `paper`, which trains whole tables, nor what needs items
with titles.
"""
VARIANTS |= {f"without_{name}": partial(without_repair, name=name) for name in REPAIRS}


def variant(name: str) -> Variant:
    """The variant of that name.

    Raises:
        ConfigError: There is none.
    """
    if name not in VARIANTS:
        raise ConfigError(
            f"There is no variant `{name}`{or_nearest(name, list(VARIANTS))}.",
            remedy=f"Variants: {', '.join(VARIANTS)}.",
        )
    return VARIANTS[name]


def num_parameters(config: RunConfig) -> int:
    """Trained parameters of a configuration's model, which is not filled with numbers."""
    inputs = load_inputs(config)
    with torch.device("meta"):
        tables = {table.name: torch.empty(table.rows.shape) for table in inputs.tables}
        features = None if inputs.item_features is None else torch.empty(inputs.item_features.shape)
        model = model_spec(config, inputs, with_consensus=False).build(tables, features)
    return sum(p.numel() for p in model.parameters())


def plan(base: RunConfig, options: argparse.Namespace) -> list[tuple[str, RunConfig]]:
    """All runs: every variant of a seed before the next seed, so that any prefix is a fair
    comparison.

    Raises:
        ConfigError: Variants of MLTFR are asked for where it is off.
    """
    names = ", ".join(name for name in options.variants if name != "bare")
    if names and not base.mltfr.enabled:
        raise ConfigError(
            f"The variants {names} are forms of MLTFR, and mltfr.enabled is false.",
            rule="They would all be the bare backbone, under other names.",
            remedy="Add mltfr.enabled=true and mltfr.tables=[...] to --set, or name `bare` alone.",
        )
    runs = []
    for seed in options.seeds:
        for data in options.data or [base.data.path]:
            for backbone in options.backbones or [base.backbone.name]:
                for name in options.variants:
                    config = vary(
                        base,
                        {"data.path": str(data), "backbone.name": backbone, "training.seed": seed},
                    )
                    config = variant(name)(config)
                    update = {
                        "name": f"{config.data.path.name}-{backbone}-{name}-{seed}",
                        "runs_dir": options.runs,
                    }
                    runs.append((name, config.model_copy(update={**update, "baselines": ()})))
    return runs


def add_baselines(matrix: Path, base: RunConfig, options: argparse.Namespace) -> None:
    """The rows of the baselines that ``matrix`` does not hold yet; minutes at most."""
    for data in options.data or [base.data.path]:
        config = vary(base, {"data.path": str(data)})
        for name in options.baselines:
            if not is_done(read_rows(matrix), name, config):
                manifest = load_manifest(config.data.path, left_out=config.data.left_out)
                place = options.runs / f"{config.data.path.name}-{name}" / RANKS
                result = baseline_result(
                    name, config, manifest, ALONE, read_test=True, ranks_file=place
                )
                append_row(matrix, make_row(name, config, result, commit(), seen(place, matrix)))


def seen(file: Path, matrix: Path) -> str | None:
    """A file's place as seen from the matrix's folder, so that both can be moved together.

    None where it is not there: the run ended before runs kept the ranks of users.
    """
    return os.path.relpath(file, matrix.parent) if file.exists() else None


def commit() -> str:
    """The commit this runs from, marked where files differ from it."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def run(config: RunConfig, launcher: Sequence[str]) -> Result | None:
    """One run in processes of its own, begun or gone on with; None where it failed (and said
    why).
    """
    claim(config.folder, config, resume=True)
    command = [*launcher, str(ROOT / "train.py"), "--config", str(config.folder / CONFIG)]
    done = subprocess.run(command, check=False)
    return load_result(config.folder) if done.returncode == 0 else None


def run_missing(
    matrix: Path, runs: Sequence[tuple[str, RunConfig]], launcher: Sequence[str], jobs: int
) -> bool:
    """Run what ``matrix`` lacks, ``jobs`` side by side; whether all succeeded. After a failure none
    is begun.
    """
    rows = read_rows(matrix)
    missing = [(name, config) for name, config in runs if not is_done(rows, name, config)]
    print(f"{len(missing)} runs to do, {len(rows)} rows in {matrix}", flush=True)
    lock, failed, at = Lock(), Event(), commit()

    def one(task: tuple[str, RunConfig]) -> None:
        name, config = task
        if failed.is_set():
            return
        result = run(config, launcher)
        with lock:
            if result is not None:
                ranks = seen(config.folder / RANKS, matrix)
                append_row(matrix, make_row(name, config, result, at, ranks))
            else:
                failed.set()
                message = f"{config.folder} failed: the matrix stops here."
                print(message, file=sys.stderr, flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, missing))
    return not failed.is_set()


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("matrix", type=Path, help="Parquet file that rows are added to")
    parser.add_argument(
        "--data", type=Path, nargs="+", help="prepared data sets (default: the configuration's)"
    )
    parser.add_argument("--backbones", nargs="+", help="backbones (default: the configuration's)")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=CONTROLS,
        help=f"any of {', '.join(VARIANTS)} (default: {', '.join(CONTROLS)})",
    )
    parser.add_argument(
        "--baselines",
        nargs="*",
        choices=BASELINES,
        default=USUAL,
        help=f"without a training loop (default: {' '.join(USUAL)})",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/quality"), help="folder of the runs"
    )
    parser.add_argument(
        "--launcher", default=sys.executable, help="what starts train.py (default: this Python)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default: 1)")
    parser.add_argument(
        "--preset",
        default=None,
        help="base configuration (default: demo, unless --config is given)",
    )
    parser.add_argument("--config", help="base configuration as YAML, over the preset's")
    parser.add_argument(
        "--set",
        nargs="+",
        metavar="KEY=VALUE",
        default=[],
        dest="overrides",
        help="over the base configuration",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing from the matrix; returns the exit code."""
    options = build_parser().parse_args(arguments)
    try:
        base = resolve_config(
            options.preset or (None if options.config else "demo"),
            options.config,
            options.overrides,
        )
        runs = plan(base, options)
        add_baselines(options.matrix, base, options)
        complete = run_missing(options.matrix, runs, shlex.split(options.launcher), options.jobs)
    except MltfrError as error:
        return fail(error)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(main())
