"""`mltfr tables`: checkpoints, or named demo tables, to stored token tables.

What can be refused is refused before the rows of the first source are read (plan.py).
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from mltfr_dist.config import TableConfig
from mltfr_dist.errors import ConfigError, DataError
from mltfr_dist.progress import follow, say
from mltfr_dist.tables.clean import normalise_rows
from mltfr_dist.tables.demo import DEMO_TABLES, demo_source
from mltfr_dist.tables.extract import OpenTable
from mltfr_dist.tables.info import TableInfo
from mltfr_dist.tables.plan import Plan, check_name, check_output, plan_table
from mltfr_dist.tables.row_file import RowFile, writing
from mltfr_dist.tables.store import new_table

Log = Callable[[str], None]


def build_tables(
    sources: Sequence[str],
    output: str | Path,
    config: TableConfig,
    *,
    name: str | None = None,
    packages: str | Path | None = None,
    log: Log = say,
) -> list[TableInfo]:
    """Extract, clean and store token tables; all are found and checked before the first is read.

    Args:
        sources: each a source as :func:`mltfr_dist.tables.extract.open_table` takes it, or a key of
            :data:`mltfr_dist.tables.demo.DEMO_TABLES`.
        output: folder of tables; a table becomes ``output / NAME``.
        config: tensor, vocabulary, normalisation.
        name: the table's name, of one source; by default the source's.
        packages: folder into which the demo tables' packages were unpacked; None: the installed
            ones.
        log: receives lines of text.

    Raises:
        ConfigError: options that cannot be meant.
        DataError: a source that cannot be read with certainty, a different table of this name,
            or no place to write to.
    """
    output = Path(output)
    packages = None if packages is None else Path(packages)
    for option, value in (("--name", name), ("--vocabulary", config.vocabulary)):
        if value is not None and len(sources) > 1:
            raise ConfigError(
                f"{option} is given for several sources.", remedy="Extract them one at a time."
            )
    check_name(name)
    check_output(output)
    plans: dict[str, Plan] = {}
    for source in sources:
        if source in DEMO_TABLES and not Path(source).exists():
            path, own_config, licence = demo_source(source, config, packages)
            plan = plan_table(path, output, own_config, name=name or source, licence=licence)
        else:
            plan = plan_table(source, output, config, name=name)
        if plan.name in plans:
            raise ConfigError(
                f"Two of the sources make a table of the name {plan.name!r}.",
                remedy="Extract them one at a time, and name one with --name.",
            )
        plans[plan.name] = plan
    return [build_plan(plan, log) for plan in plans.values()]


def build_table(
    source: str,
    output: Path,
    config: TableConfig,
    *,
    name: str | None = None,
    licence: str | None = None,
    log: Log = say,
) -> TableInfo:
    """Extract, clean and store one token table, saying what was kept and why the rest was not.

    Args:
        source: see :func:`mltfr_dist.tables.extract.open_table`.
        output: folder of tables; the table becomes ``output / name``.
        config: tensor, vocabulary, normalisation.
        name: the table's name; by default the source's.
        licence: of the source, where it does not state it itself.
        log: receives lines of text.

    Raises:
        ConfigError: a name that no table can have.
        DataError: a source that cannot be read with certainty, a different table of this name,
            or no place to write to.
    """
    check_name(name)
    check_output(output)
    return build_plan(plan_table(source, output, config, name=name, licence=licence), log)


def build_plan(plan: Plan, log: Log) -> TableInfo:
    """Read, normalise and store what was planned, and say what came out.

    Raises:
        DataError: numbers that are not finite, rows that are all equal, or no space.
    """
    table, source, how = plan.table, plan.table.source, plan.config.normalise
    num_rows, digest = len(table.vocabulary), hashlib.sha256()
    with new_table(plan.output, plan.name, num_rows, source.dim, log) as new:
        with writing(plan.output):
            if shutil.disk_usage(new.folder).free < 4 * num_rows * source.dim:
                raise OSError(
                    0, f"the table needs {4 * num_rows * source.dim / 1e9:.2f} GB of space"
                )
        num_zero = _fill(new.rows, table, digest, log)
        before, after = normalise_rows(new.rows, how, log)
        info = new.finish(
            table.vocabulary,
            **plan.described,
            source_sha256=digest.hexdigest(),
            # Rounded, so that the last bits of a sum do not make two equal tables differ.
            mean_cosine_before=round(before, 6),
            mean_cosine_after=round(after, 6),
        )
    _report(info, table, num_zero, log)
    log(f"  {how}: mean cosine of two rows {before:.4f} before, {after:.4f} after")
    log(f"  stored in {plan.output / info.name}, sha256 {info.table_sha256[:16]}")
    return info


def _fill(rows: RowFile, table: OpenTable, digest: hashlib._Hash, log: Log) -> int:
    """Copy the kept rows; returns how many of them are zero.

    Raises:
        DataError: numbers that are not finite, or no two different rows.
    """
    done, num_zero, differ, first = 0, 0, False, torch.empty(0)
    for _, block in follow(table.blocks(digest), "reading", table.source.num_rows, log):
        first = block[:1] if done == 0 else first  # [1, D]
        differ = differ or bool((block != first).any())
        num_zero += int((~block.any(dim=1)).sum())
        rows.write(done, block)
        done += len(block)
    if not differ:
        raise DataError(
            f"All {done:,} kept rows of {table.source.tensor} are equal"
            + (": they are zero." if num_zero else "."),
            rule="Rows that are equal tell no token from another.",
            remedy=f"Name another tensor with --tensor than {table.source.tensor}, or fetch the "
            "checkpoint again.",
        )
    return num_zero


def _report(info: TableInfo, table: OpenTable, num_zero: int, log: Log) -> None:
    """Say what was taken, and what about it may not be as it should."""
    source, kind = table.source, f" ({table.vocabulary_kind})" if table.vocabulary_kind else ""
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in info.dropped.items()) or "none"
    log(
        f"{info.name}: {source.tensor} [{source.num_rows:,}, {source.dim}] {source.dtype} "
        f"of {', '.join(source.files)}"
    )
    log(
        f"  tensor chosen by {source.chosen_by}; tokens from {info.vocabulary_file}{kind}; "
        f"licence: {info.licence or 'not stated'}"
    )
    log(f"  kept {info.num_rows:,} rows; dropped: {reasons}")
    if without := info.dropped.get("no_row"):
        log(
            f"  warning: {without:,} token(s) of {info.vocabulary_file} have no row among the "
            f"{source.num_rows:,} of {source.tensor} and were left out"
        )
    if (without := info.dropped.get("no_entry", 0)) > source.num_rows / 2:
        log(
            f"  warning: {without:,} of {source.num_rows:,} rows have no token in "
            f"{info.vocabulary_file}; is it this model's vocabulary?"
        )
    if num_zero:
        log(f"  warning: {num_zero:,} of the kept rows are zero in the source")
