"""A matrix of runs in one Parquet file: one row a run, and what can be said over its seeds.

Baselines without a training loop have a row for each data set, with ``backbone`` "none" and seed 0.

Columns: dataset, backbone, variant, seed, config_sha256, commit, ranks (the file of its users'
ranks, as seen from the matrix's folder; None in rows of before), stage, epoch, epochs, seconds,
parameters, the gate's ``gate/entropy``, ``gate/largest_weight`` and ``gate/largest_top_share``, and
each metric as ``valid/NDCG@10``, ``test/NDCG@10``, ``test/item_rare/NDCG@10``.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from scipy import stats

from mltfr_dist.baselines import BASELINES
from mltfr_dist.config import RunConfig
from mltfr_dist.errors import ConfigError, DataError
from mltfr_dist.files import replacing
from mltfr_dist.training.comparing.compare import Options
from mltfr_dist.training.comparing.load import MATRIX_COLUMN
from mltfr_dist.training.comparing.text import aligned
from mltfr_dist.training.reporting.matrix_differences import COMPARED, Row, differences, table
from mltfr_dist.training.run_folder import Result

NO_BACKBONE = "none"
KEY = ("dataset", "backbone", "variant", "seed")
USUAL = ("popularity", "item_knn")
"""Baselines that a matrix has unless others are asked for."""
REFERENCES = ("bare", "random_tables")
SHOWN = ("valid/NDCG@10", "test/NDCG@10", "test/HR@10")
GATE = ("entropy", "largest_weight", "largest_top_share")


def config_sha256(config: RunConfig) -> str:
    """Hash of everything that sets a run's numbers; not of where it is written."""
    values = config.model_dump(mode="json", exclude={"name", "runs_dir"})
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def baseline_sha256(config: RunConfig) -> str:
    """Hash of what sets a baseline's numbers: how is ranked, and what is left out."""
    values = [config.evaluation.model_dump(mode="json"), list(config.data.left_out)]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def key_and_hash(variant: str, config: RunConfig) -> tuple[tuple[str, str, str, int], str]:
    """What tells a row from others, and the hash of what set its numbers."""
    dataset = config.data.path.name
    if variant in BASELINES:
        return (dataset, NO_BACKBONE, variant, 0), baseline_sha256(config)
    key = (dataset, config.backbone.name, variant, config.training.seed)
    return key, config_sha256(config)


def make_row(
    variant: str, config: RunConfig, result: Result, commit: str, ranks: str | None = None
) -> Row:
    """One run's row, or a baseline's; ``ranks`` is its file of ranks, as seen from the matrix."""
    key, digest = key_and_hash(variant, config)
    row: Row = {
        **dict(zip(KEY, key, strict=True)),
        "config_sha256": digest,
        "commit": commit,
        MATRIX_COLUMN: ranks,
        **{
            name: getattr(result, name)
            for name in ("stage", "epoch", "epochs", "seconds", "parameters")
        },
    }
    row |= {f"gate/{name}": result.routing[name] for name in GATE if result.routing}
    row |= {f"valid/{name}": value for name, value in result.valid.items()}
    row |= {f"test/{name}": value for name, value in result.test.items()}
    return row | {
        f"test/{s}/{name}": v
        for s, values in result.test_slices.items()
        for name, v in values.items()
    }


def read_rows(path: Path) -> list[Row]:
    """All rows; none where the file is not there yet.

    Raises:
        DataError: It is no matrix.
    """
    if not path.exists():
        return []
    try:
        rows: list[Row] = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} cannot be read as Parquet: {error}.",
            remedy="Name a file that benchmarks/quality.py wrote.",
        ) from None
    missing = [name for name in (*KEY, *SHOWN) if rows and name not in rows[0]]
    if missing:
        raise DataError(
            f"{path} lacks the columns {', '.join(missing)}.",
            remedy="Name a file that benchmarks/quality.py wrote.",
        )
    return rows


def append_row(path: Path, row: Row) -> None:
    """Add one row; the file is replaced in one step."""
    table = pa.Table.from_pylist([row])
    if path.exists():
        table = pa.concat_tables([pq.read_table(path), table], promote_options="default")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        pq.write_table(table, partial)


def is_done(rows: Sequence[Row], variant: str, config: RunConfig) -> bool:
    """Whether the matrix holds this run.

    Raises:
        ConfigError: It holds one of the same name made otherwise.
    """
    wanted, digest = key_and_hash(variant, config)
    for row in rows:
        if tuple(row[name] for name in KEY) == wanted:
            if row["config_sha256"] == digest:
                return True
            raise ConfigError(
                f"The matrix already holds {', '.join(map(str, wanted))}, made with another "
                f"configuration.",
                rule="Rows of one matrix differ in data set, backbone, variant and seed only.",
                remedy="Write to another file, or give the settings it was begun with.",
            )
    return False


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95% Student t-interval (NaN with one value: nothing is known of
    the spread).
    """
    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return mean, math.nan
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, float(stats.t.ppf(0.975, n - 1)) * deviation / math.sqrt(n)


def summary(paths: Sequence[str | Path], options: Options | None = None) -> str:
    """Mean and interval over seeds per variant, differences paired by seed, and means by slice of
    users.

    Args:
        paths: Matrices, taken together.
        options: Margin of equivalence, and the difference that seeds are counted for.

    Raises:
        DataError: No matrix there, an empty one, a run that stands in two of them, or runs of one
            data set that were ranked by other rules or have other users.
    """
    options = options or Options()
    rows: list[Row] = []
    for path in map(Path, paths):
        matrix_rows = read_rows(path)
        if not matrix_rows:
            raise DataError(
                f"{path} does not exist or holds no row.",
                remedy="Fill it with benchmarks/quality.py.",
            )
        rows += [located(row, path.parent) for row in matrix_rows]
    rows = once(rows)
    lines: list[str] = []
    for dataset in dict.fromkeys(row["dataset"] for row in rows):
        of_data = [row for row in rows if row["dataset"] == dataset]
        simple = [row for row in of_data if row["backbone"] == NO_BACKBONE]
        backbones = dict.fromkeys(r["backbone"] for r in of_data if r["backbone"] != NO_BACKBONE)
        for backbone in backbones or (NO_BACKBONE,):
            runs = [row for row in of_data if row["backbone"] == backbone != NO_BACKBONE]
            lines += group_lines(f"{dataset}, {backbone}", simple, runs, options)
    return "\n".join([*lines, *how(options)])


def how(options: Options) -> list[str]:
    """What the numbers of the differences are."""
    of = "the observed difference" if options.difference is None else f"{options.difference:g}"
    return [
        "Intervals over users and seeds are bootstrap intervals of the users' ranks, "
        f"{options.resamples:,} resamples, seed {options.seed}; those over seeds alone are "
        f"t-intervals.",
        "p: the larger of those of the paired randomisation test over users and of the t-test over "
        "users and seeds; where users are not known of the t-test over seeds. Holm over the lines "
        "of a table. A difference is shown where p is below 0.05 and the interval leaves zero out.",
        "Detectable: the smallest true difference that this design finds with 80% power. Seeds "
        f"needed: to find {of} so; `more users` where no number of seeds does.",
    ]


def located(row: Row, folder: Path) -> Row:
    """A row whose file of ranks is named as seen from here."""
    named = row.get(MATRIX_COLUMN)
    return row | {MATRIX_COLUMN: str(folder / named)} if named else row


def once(rows: Sequence[Row]) -> list[Row]:
    """Each row once: matrices of one data set may each hold its baselines, with the same numbers.

    Raises:
        DataError: A run stands there twice, or a baseline with other numbers.
    """
    first_of: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = tuple(row[name] for name in KEY)
        first = first_of.setdefault(key, row)
        same = all(first[name] == row[name] for name in ("config_sha256", *SHOWN))
        if first is not row and not (same and row["backbone"] == NO_BACKBONE):
            raise DataError(
                f"{', '.join(map(str, key))} stands in the matrices more than once.",
                rule="A run counts once.",
                remedy="Leave out the file that holds it again.",
            )
    return list(first_of.values())


def group_lines(
    title: str, baselines: Sequence[Row], runs: Sequence[Row], options: Options
) -> list[str]:
    """What is said of one data set and backbone: the baselines' rows first, then the runs'."""
    here = [*baselines, *runs]
    lines = [f"{title}: mean +- 95% t-interval over seeds", "", *aligned(means(here)), ""]
    missing = [name for name in USUAL if name not in {row["variant"] for row in baselines}]
    if missing:
        what = " and ".join(missing)
        lines += [f"{what} are missing: benchmarks/quality.py, started again, adds their rows.", ""]
    for reference in REFERENCES:
        compared = differences(runs, reference, options)
        if compared.lines:
            title = f"{COMPARED}, difference to {reference}, paired by seed, over {compared.over}"
            lines += [title, "", *aligned(table(compared.lines, options)), ""]
            lines += [f"Protocol: {compared.protocol}.", ""]
    by_slice = slice_means(here)
    if len(by_slice[0]) > 1:
        title = (
            "NDCG@10 by slice of the test users: "
            "thirds by the target's popularity and by length of history"
        )
        lines += [title, "", *aligned(by_slice), ""]
    return lines


def slice_means(rows: Sequence[Row]) -> list[list[str]]:
    """A table with a line a variant and a column a slice, with its number of users; one column
    where there are none.
    """
    suffix = "/NDCG@10"
    columns = dict.fromkeys(name for row in rows for name, v in row.items() if v is not None)
    names = [
        name.split("/")[1]
        for name in columns
        if name.startswith("test/") and name.endswith(suffix) and name != COMPARED
    ]

    def cell(runs: Sequence[Row], column: str, form: str) -> str:
        values = [row[column] for row in runs if row.get(column) is not None]
        return format(math.fsum(values) / len(values), form) if len(values) == len(runs) else "-"

    users = []
    for name in names:
        having = [row for row in rows if row.get(f"test/{name}{suffix}") is not None]
        users.append(cell(having[:1], f"test/{name}/users", ",.0f"))
    table = [["variant", *names], ["(users)", *users]] if names else [["variant"]]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        runs = [row for row in rows if row["variant"] == variant]
        table.append([variant, *(cell(runs, f"test/{name}{suffix}", ".4f") for name in names)])
    return table


def means(rows: Sequence[Row]) -> list[list[str]]:
    """A table with a line a variant; a baseline has no seeds."""
    table = [["variant", "seeds", *SHOWN, "parameters", "seconds"]]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        runs = [row for row in rows if row["variant"] == variant]
        seconds = f"{math.fsum(row['seconds'] for row in runs) / len(runs):.0f}"
        if runs[0]["backbone"] == NO_BACKBONE:
            values = [f"{runs[0][name]:.4f}" + " " * len(" +- 0.0000") for name in SHOWN]
            table.append([variant, "-", *values, "0", seconds])
            continue
        cells = [shown(*interval([row[name] for row in runs])) for name in SHOWN]
        table.append([variant, str(len(runs)), *cells, f"{runs[0]['parameters']:,}", seconds])
    return table


def shown(mean: float, half: float, sign: str = "") -> str:
    """`0.1234 +- 0.0056`."""
    return f"{mean:{sign}.4f} +- " + ("?" if math.isnan(half) else f"{half:.4f}")
