"""`mltfr prepare`: raw interactions -> shards, id maps and manifest, out of core in DuckDB.

See steps.py for the tables and the order of ids.
"""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from mltfr_dist.config import PrepareConfig
from mltfr_dist.data import sources, splits
from mltfr_dist.data.manifest import (
    MANIFEST_NAME,
    SPLITS,
    Manifest,
    PrepareReport,
    SourceInfo,
    SplitInfo,
    load_manifest,
    verify_folder,
)
from mltfr_dist.data.shards import write_split
from mltfr_dist.data.steps import (
    Log,
    StepLog,
    count_cold,
    count_rows,
    drop_duplicates,
    k_core,
    make_id_maps,
    order_by_time,
)
from mltfr_dist.errors import DataError
from mltfr_dist.files import file_sha256

_ROWS_PER_BATCH = 1_048_576


def prepare(source: str, output: Path, config: PrepareConfig, *, packages_dir: Path | None = None, log: Log = print) -> Manifest:
    """Prepare ``source`` into the folder ``output``: complete, or not there at all.

    Equal input and configuration give equal bytes in every file.

    Args:
        source: path of a data file, or a named set (see ``sources.NAMED_SETS``).
        output: folder to write; one that holds the same data already is verified and reused.
        config: what to keep and how to split.
        packages_dir: where named sets' packages were unpacked; None: where this Python finds them.
        log: takes each line of the report.

    Returns:
        the manifest, as written.

    Raises:
        DataError: the source or the output folder cannot be used, or nothing is left to train on.
    """
    path, config = _resolve(source, config, packages_dir)
    info = _source_info(path, config)
    recorded = config.model_copy(update={"titles": Path(config.titles.name) if config.titles else None})
    if _is_reusable(output, info, recorded):
        manifest = verify_folder(output)
        log(f"{output} already holds this data, from the same source and configuration: verified and reused.")
        return manifest
    partial = output.parent / f".{output.name}.partial-{uuid.uuid4().hex[:8]}"
    work = partial / "work"
    work.mkdir(parents=True)
    try:
        settings = {"temp_directory": str(work / "spill"), "autoinstall_known_extensions": "false"}
        with duckdb.connect(str(work / "prepare.duckdb"), config=settings) as connection:
            connection.execute("SET TimeZone = 'UTC'; SET preserve_insertion_order = true")
            manifest = _run(connection, path, partial, config, recorded, info, log)
        shutil.rmtree(work)
        (partial / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        partial.rename(output)  # onto an empty folder or none
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    log(f"Written to {output}.")
    return manifest


def _resolve(source: str, config: PrepareConfig, packages_dir: Path | None) -> tuple[Path, PrepareConfig]:
    """The file to read, and the configuration with a named set's columns and titles filled in."""
    if source in sources.NAMED_SETS:
        found = sources.named_source(source, packages_dir)
        # A named set knows its files: a format or column set for another file would only break it.
        titles = {"titles": found.titles} if config.titles is None else {}
        columns = {key: value for key, value in found.columns.items() if config.titles is None or not key.startswith("titles_")}
        return found.interactions, config.model_copy(update={"format": "tsv", **columns, **titles})
    path = Path(source)
    format = sources.detect_format(path, config.format)
    if format == "sequences" and config.split == "global_temporal":
        raise DataError(
            f"{path} is sequence text, which has no time.",
            rule="global_temporal cuts all users at two points in time.",
            remedy="Use split=leave_one_out, or a file with a time column.",
        )
    if config.titles is not None:
        sources.detect_format(config.titles)
    return path, config.model_copy(update={"format": format})


def _source_info(path: Path, config: PrepareConfig) -> SourceInfo:
    titles = config.titles
    return SourceInfo(
        file=path.name,
        bytes=path.stat().st_size,
        sha256=file_sha256(path),
        titles_file=titles.name if titles else None,
        titles_sha256=file_sha256(titles) if titles else None,
    )


def _is_reusable(output: Path, info: SourceInfo, recorded: PrepareConfig) -> bool:
    """Whether ``output`` holds this data; False if it is absent or empty.

    Raises:
        DataError: it holds something else, which is never overwritten.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / MANIFEST_NAME).is_file():
        raise DataError(
            f"{output} exists and holds something other than prepared data.",
            rule="Preparation writes into a new or empty folder and never overwrites.",
            remedy="Give another output folder, or empty this one.",
        )
    manifest = load_manifest(output)
    before = manifest.source.model_dump() | manifest.prepare.model_dump()
    now = info.model_dump() | recorded.model_dump()
    changed = [f"{key} was {before[key]}, now {now[key]}" for key in now if before[key] != now[key]]
    if changed:
        raise DataError(
            f"{output} holds data prepared differently: {'; '.join(changed)}.",
            rule="Prepared data is never overwritten, since runs may depend on it.",
            remedy="Give another output folder, or remove this one.",
        )
    return True


def _run(
    connection: duckdb.DuckDBPyConnection,
    path: Path,
    folder: Path,
    config: PrepareConfig,
    recorded: PrepareConfig,
    info: SourceInfo,
    log: Log,
) -> Manifest:
    """All steps on an open database; writes everything but the manifest into ``folder``."""
    steps = StepLog(log)
    rows = sources.load_interactions(connection, path, config)
    steps.done("read", rows, note=f"{config.format}, {info.bytes / 1e6:,.1f} MB")
    sources.load_titles(connection, config.titles, config.titles_item_column, config.titles_title_column)
    unique = drop_duplicates(connection, config.duplicates)
    steps.done("duplicates", unique, rows - unique, config.duplicates)
    core_rounds = k_core(connection, config.user_core, config.item_core, steps)
    ties = order_by_time(connection)
    kept = count_rows(connection, "SELECT count(*) FROM ordered")
    steps.done("order by time", kept, note=f"{ties:,} ties keep file order")

    cuts = splits.make_prefixes(
        connection, config.split, valid_fraction=config.valid_fraction, test_fraction=config.test_fraction
    )
    splits.check_no_leak(connection, cuts)
    train_only = count_rows(connection, "SELECT count(*) FROM prefixes WHERE length < 3") if cuts is None else 0
    short = count_rows(connection, "SELECT count(*) FROM prefixes WHERE train_length = 1")
    note = f"no leak; {train_only:,} users train only; {short:,} training parts of 1 item not stored"
    steps.done(config.split, kept, note=note)
    make_id_maps(connection)
    report = PrepareReport(
        rows_read=rows,
        duplicates_dropped=rows - unique,
        core_rounds=core_rounds,
        ties=ties,
        train_only_users=train_only,
        short_train_sequences=short,
        cold_targets={name: count_cold(connection, name) for name in ("valid", "test")},
        cut_times=(splits.time_text(cuts[0]), splits.time_text(cuts[1])) if cuts else None,
        items_with_title=count_rows(connection, "SELECT count(title) FROM item_map"),
    )
    num_users = count_rows(connection, "SELECT count(*) FROM user_map")
    num_items = count_rows(connection, "SELECT count(*) FROM item_map")
    steps.done("id maps", kept, note=f"{num_users:,} users, {num_items:,} items, {report.items_with_title:,} titles")
    return Manifest(
        num_users=num_users,
        num_items=num_items,
        num_interactions=kept,
        splits=_write_splits(connection, folder, config, report, steps, num_items=num_items, num_users=num_users),
        source=info,
        prepare=recorded,
        report=report,
        files=_write_maps(connection, folder),
    )


def _write_splits(
    connection: duckdb.DuckDBPyConnection,
    folder: Path,
    config: PrepareConfig,
    report: PrepareReport,
    steps: StepLog,
    *,
    num_items: int,
    num_users: int,
) -> dict[str, SplitInfo]:
    written: dict[str, SplitInfo] = {}
    for name in SPLITS:
        query = (
            "SELECT user_index, item_index FROM ordered JOIN prefixes USING (user_code) JOIN user_map USING (user_code) "
            f"JOIN item_map USING (item_code) WHERE position <= {name}_end ORDER BY user_index, position"
        )
        split = write_split(
            folder,
            name,
            ((batch.column(0).to_numpy(), batch.column(1).to_numpy()) for batch in _batches(connection, query)),
            num_items=num_items,
            num_users=num_users,
            sequences_per_block=config.sequences_per_block,
            sequences_per_shard=config.sequences_per_shard,
        )
        note = f"{split.num_sequences:,} sequences, shards: {len(split.shards)}"
        note += f", {report.cold_targets[name]:,} cold targets" if name in report.cold_targets else ""
        steps.done(f"write {name}", split.num_items, note=note)
        written[name] = split
    return written


def _write_maps(connection: duckdb.DuckDBPyConnection, folder: Path) -> dict[str, str]:
    """Write `items.parquet` and `users.parquet`; returns their sha256 by name."""
    queries = {
        "items.parquet": "SELECT item_index, item_id, title, count FROM item_map ORDER BY item_index",
        "users.parquet": "SELECT user_index, user_id, length FROM user_map ORDER BY user_index",
    }
    for name, query in queries.items():
        reader = _batches(connection, query)
        with pq.ParquetWriter(folder / name, reader.schema) as writer:
            # Row groups of a fixed size: how DuckDB cuts its batches must not show in the bytes.
            pending: list[pa.RecordBatch] = []
            for batch in reader:
                pending.append(batch)
                table = pa.Table.from_batches(pending)
                if len(table) >= _ROWS_PER_BATCH:
                    writer.write_table(table.slice(0, _ROWS_PER_BATCH))
                    pending = table.slice(_ROWS_PER_BATCH).to_batches()
            writer.write_table(pa.Table.from_batches(pending, reader.schema))
    return {name: file_sha256(folder / name) for name in queries}


def _batches(connection: duckdb.DuckDBPyConnection, query: str) -> pa.RecordBatchReader:
    reader: pa.RecordBatchReader = connection.sql(query).to_arrow_reader(_ROWS_PER_BATCH)
    return reader
