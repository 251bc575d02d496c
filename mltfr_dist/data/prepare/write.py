"""Ordered interactions -> shards of all splits in one pass over the users, and the id maps."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mltfr_dist.config import PrepareConfig
from mltfr_dist.data.prepare.workspace import Workspace
from mltfr_dist.data.shards.manifest import SPLITS, SplitInfo
from mltfr_dist.data.shards.packed import PackedSequences
from mltfr_dist.data.shards.writer import SplitWriter
from mltfr_dist.data.sources.readers import one
from mltfr_dist.files import file_sha256
from mltfr_dist.progress import duration

_ROWS_PER_BATCH = 1_048_576
ROWS_PER_RUN = 2_000_000


def write_splits(
    connection: duckdb.DuckDBPyConnection,
    workspace: Workspace,
    config: PrepareConfig,
    *,
    num_items: int,
    num_users: int,
) -> dict[str, SplitInfo]:
    """Write the shards of every split, going on behind those that are there.

    A user's sequence in each split is a prefix of the history, so each run of users is read once
    for all splits.
    """
    writers: dict[str, SplitWriter] = {}
    next_user: dict[str, int] = {}
    for split in SPLITS:
        before = workspace.written_shards(split)
        next_user[split] = before[-1].last_user + 1 if before else 0
        writers[split] = SplitWriter(
            workspace.out,
            split,
            num_items=num_items,
            num_users=num_users,
            sequences_per_block=config.sequences_per_block,
            sequences_per_shard=config.sequences_per_shard,
            written=[shard.info for shard in before],
            on_shard=partial(workspace.record_shard, split),
        )
        if before:
            workspace.log(f"{split}: {len(before)} shards are there, verified")
    finished = {info.file for writer in writers.values() for info in writer.shards}
    for path in workspace.out.iterdir():
        if path.name not in finished:
            path.unlink()  # begun or damaged before the interruption
    indices = item_indices(connection)
    total = one(connection, "SELECT count(*) FROM ordered")[0]
    per_run = max(1, ROWS_PER_RUN * num_users // total)
    first = min(next_user.values())
    began = said = time.monotonic()
    for start in range(first, num_users, per_run):
        end = min(start + per_run, num_users)
        items, users = _histories(connection, indices, start, end)
        for split, writer in writers.items():
            several = config.targets == "all" and split != "train"
            writer.add(_prefixes(items, users, split, next_user[split], several=several))
        if time.monotonic() - said > 10:
            said = time.monotonic()
            rate = (end - first) / (said - began)
            workspace.log(
                f"  ... {end / num_users:.0%} of the users, {rate:,.0f} a second, "
                f"about {duration((num_users - end) / rate)} left"
            )
    return {split: writer.finish() for split, writer in writers.items()}


def item_indices(connection: duckdb.DuckDBPyConnection) -> np.ndarray:
    """[greatest item_code + 1] item_index of each code."""
    columns = connection.execute("SELECT item_code, item_index FROM item_map").fetchnumpy()
    indices = np.zeros(int(columns["item_code"].max()) + 1, dtype=np.int64)
    indices[columns["item_code"]] = columns["item_index"]
    return indices


def _histories(
    connection: duckdb.DuckDBPyConnection, indices: np.ndarray, start: int, end: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Items of the users ``start`` up to ``end``, one history after the other, and the users' rows
    of ``user_map``.
    """
    users = connection.execute(
        "SELECT user_code, user_index, length, train_end, valid_end, valid_targets, test_end, "
        "test_targets FROM user_map WHERE user_index >= $1 AND user_index < $2 ORDER BY user_index",
        [start, end],
    ).fetchnumpy()
    codes = [int(users["user_code"][0]), int(users["user_code"][-1])]
    items = connection.execute(
        "SELECT item_code FROM ordered WHERE user_code >= $1 AND user_code <= $2 ORDER BY "
        "user_code, position",
        codes,
    ).fetchnumpy()["item_code"]
    return indices[items], users


def _prefixes(
    items: np.ndarray,
    users: dict[str, np.ndarray],
    split: str,
    first_user: int,
    *,
    several: bool,
) -> PackedSequences:
    """The sequences of one split: of each user from ``first_user`` on the items up to its end,
    where there are any; with the number of targets where they may be ``several``.
    """
    starts, ends = np.cumsum(users["length"]) - users["length"], users[f"{split}_end"]
    chosen = (ends > 0) & (users["user_index"] >= first_user)
    lengths = ends[chosen].astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    indices = np.repeat(starts[chosen] - offsets[:-1], lengths) + np.arange(offsets[-1])
    targets = users[f"{split}_targets"][chosen].astype(np.int64) if several else None
    return PackedSequences(
        items[indices.astype(np.int64)], offsets, users["user_index"][chosen], targets
    )


def write_maps(connection: duckdb.DuckDBPyConnection, folder: Path) -> dict[str, str]:
    """Write `items.parquet` and `users.parquet`; returns their sha256 by name."""
    queries = {
        "items.parquet": "SELECT item_index, item_id, title, count FROM item_map ORDER BY item_index",  # noqa: E501
        "users.parquet": "SELECT user_index, user_id, length FROM user_map ORDER BY user_index",
    }
    for name, query in queries.items():
        reader: pa.RecordBatchReader = connection.sql(query).to_arrow_reader(_ROWS_PER_BATCH)
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
