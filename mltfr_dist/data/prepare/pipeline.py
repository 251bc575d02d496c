"""All steps of a preparation, in order, on an open database; each is done once."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import duckdb

from mltfr_dist.config import PrepareConfig
from mltfr_dist.data.prepare import splits
from mltfr_dist.data.prepare.steps import (
    StepLog,
    count_cold,
    count_rows,
    drop_duplicates,
    k_core,
    make_id_maps,
    order_by_time,
)
from mltfr_dist.data.prepare.workspace import Workspace
from mltfr_dist.data.shards.manifest import (
    SCHEMA_VERSION,
    SEVERAL_TARGETS_VERSION,
    CoreRound,
    Manifest,
    PrepareReport,
    SourceInfo,
    SplitInfo,
)
from mltfr_dist.data.sources import read as sources
from mltfr_dist.data.sources.gather import Source
from mltfr_dist.data.sources.readers import one
from mltfr_dist.data.sources.times import time_text


def run_steps(
    connection: duckdb.DuckDBPyConnection,
    source: Source,
    workspace: Workspace,
    config: PrepareConfig,
    recorded: PrepareConfig,
    info: SourceInfo,
) -> Manifest:
    """All steps on an open database; writes everything but the manifest into the workspace."""
    steps = StepLog(workspace.log)

    def read() -> int:
        with source.plain(workspace.copies, config.format, workspace.log) as (files, titles):
            rows = sources.load_interactions(connection, files, config, workspace.log)
            steps.done("read", rows, note=f"{config.format}, {info.bytes / 1e6:,.1f} MB")
            sources.load_titles(
                connection, titles, config.titles_item_column, config.titles_title_column
            )
        return rows

    rows = workspace.step(connection, "read", read)

    def deduplicate() -> int:
        unique = drop_duplicates(connection, config.duplicates)
        steps.done("duplicates", unique, rows - unique, config.duplicates)
        return unique

    unique = workspace.step(connection, "duplicates", deduplicate)

    def core() -> list[dict[str, Any]]:
        kept_rounds = k_core(connection, config.user_core, config.item_core, steps)
        return [core_round.model_dump() for core_round in kept_rounds]

    rounds = workspace.step(connection, "k-core", core)

    def order() -> list[int]:
        ties = order_by_time(connection)
        kept = count_rows(connection, "SELECT count(*) FROM ordered")
        steps.done("order by time", kept, note=f"{ties:,} ties keep file order")
        return [kept, ties]

    kept, ties = workspace.step(connection, "order by time", order)
    report = workspace.step(connection, "split", lambda: _split(connection, config, kept, steps))
    cut = Decimal(report["cut_times"][0]) if report["cut_times"] else None
    sizes, written, files = _write(connection, workspace, config, cut, steps)
    return Manifest(
        **sizes,
        num_interactions=kept,
        splits=written,
        source=info,
        prepare=recorded,
        report=PrepareReport(
            rows_read=rows,
            duplicates_dropped=rows - unique,
            core_rounds=tuple(CoreRound.model_validate(values) for values in rounds),
            ties=ties,
            **report,
        ),
        files=files,
    ).sealed()


def _write(
    connection: duckdb.DuckDBPyConnection,
    workspace: Workspace,
    config: PrepareConfig,
    cut: Decimal | None,
    steps: StepLog,
) -> tuple[dict[str, int], dict[str, SplitInfo], dict[str, str]]:
    """Shards and maps, read back; the manifest's version, sizes and entries of both."""
    from mltfr_dist.data.prepare.leaks import check_train_shards
    from mltfr_dist.data.prepare.write import write_maps, write_splits

    num_users = count_rows(connection, "SELECT count(*) FROM user_map")
    num_items = count_rows(connection, "SELECT count(*) FROM item_map")
    written = write_splits(connection, workspace, config, num_items=num_items, num_users=num_users)
    files = write_maps(connection, workspace.out)
    noted = ", ".join(
        f"{name} {split.num_sequences:,} in {len(split.shards)} shards"
        for name, split in written.items()
    )
    steps.done("write", sum(split.num_items for split in written.values()), note=noted)
    compared = check_train_shards(
        connection, workspace.out, written["train"].shards, num_items=num_items, cut=cut
    )
    steps.done("read back", compared, note="no leak in the training shards as written")
    version = SEVERAL_TARGETS_VERSION if config.targets == "all" else SCHEMA_VERSION
    sizes = {"schema_version": version, "num_users": num_users, "num_items": num_items}
    return sizes, written, files


def _split(
    connection: duckdb.DuckDBPyConnection, config: PrepareConfig, kept: int, steps: StepLog
) -> dict[str, Any]:
    """Cut the histories, prove that nothing leaks, map the ids; the rest of the report."""
    cuts = splits.make_prefixes(
        connection,
        config.split,
        targets=config.targets,
        valid_fraction=config.valid_fraction,
        test_fraction=config.test_fraction,
    )
    splits.check_no_leak(connection, cuts)
    train_only = (
        count_rows(connection, "SELECT count(*) FROM prefixes WHERE length < 3")
        if cuts is None
        else 0
    )
    short = count_rows(connection, "SELECT count(*) FROM prefixes WHERE train_length = 1")
    note = (
        f"no leak; {train_only:,} users train only; {short:,} training parts of 1 item not stored"
    )
    steps.done(config.split, kept, note=note)
    make_id_maps(connection)
    cold = {name: count_cold(connection, name) for name in ("valid", "test")}
    titles = count_rows(connection, "SELECT count(title) FROM item_map")
    steps.done(
        "id maps",
        kept,
        note=f"{titles:,} titles; cold targets: {cold['valid']:,} valid, {cold['test']:,} test",
    )
    return {
        "train_only_users": train_only,
        "short_train_sequences": short,
        "cold_targets": cold,
        "cut_times": [time_text(cuts[0]), time_text(cuts[1])] if cuts else None,
        "items_with_title": titles,
        "times": _time_range(connection) if sources.has_time(config) else None,
    }


def _time_range(connection: duckdb.DuckDBPyConnection) -> list[str]:
    earliest, latest = one(connection, "SELECT min(timestamp), max(timestamp) FROM ordered")
    return [time_text(Decimal(earliest)), time_text(Decimal(latest))]
