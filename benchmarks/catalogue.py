"""A catalogue of 10^8 items by what reads it: time, and memory above what the process had before.

Prepared data of so many items is written by this script: ids of ten signs in no order, such as
B00K3XQ91Z, no titles, and some users whose items follow Zipf's law. Each way runs in a process of
its own: the map of items opened; the ids of 100 histories to numbers, and those of their last items
back; 100 users placed by popularity, and answered by it; the seen items of an evaluation;
`mltfr inspect` with plots; and the slices of the test metrics.

    python benchmarks/catalogue.py data/huge              # 10^8 items: 2 GB of disk
    python benchmarks/catalogue.py data/large --items 10000000
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mltfr_dist.config import PrepareConfig, RunConfig
from mltfr_dist.data.inspect.report import inspect
from mltfr_dist.data.shards.manifest import (
    ITEMS_NAME,
    MANIFEST_NAME,
    SPLITS,
    USERS_NAME,
    Manifest,
    PrepareReport,
    SourceInfo,
    read_manifest,
)
from mltfr_dist.data.shards.packed import PackedSequences
from mltfr_dist.data.shards.short_parts import training_sequences
from mltfr_dist.data.shards.writer import SplitWriter
from mltfr_dist.data.stream.negatives import sample_shared
from mltfr_dist.distributed.ranks import ALONE
from mltfr_dist.distributed.resources import forget_peak_memory, peak_memory_bytes
from mltfr_dist.files import file_sha256
from mltfr_dist.schema import validate
from mltfr_dist.serving.candidates import Candidates
from mltfr_dist.serving.histories import encode
from mltfr_dist.serving.items import TYPES, ItemMap
from mltfr_dist.serving.scoring import best_items
from mltfr_dist.training.evaluating.baselines import popularity
from mltfr_dist.training.evaluating.rankers import excluded
from mltfr_dist.training.evaluating.slices import training_slices
from mltfr_dist.training.items import load_items
from mltfr_dist.training.streams import ranking_stream

ROWS = 1 << 20
"""Rows of a group, as preparation writes them."""
USERS, LENGTH = 100_000, 12
ASKED = 100
SIGNS = np.frombuffer(b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", np.uint8)
IDS = 36**7


def raw_ids(numbers: np.ndarray) -> pa.Array:
    """[n] ids, different ones for different numbers below 36^7, in no order."""
    scattered = (numbers * 40_692_229 + 271_828_183) % IDS  # the factor shares none with 36
    content = np.empty((len(numbers), 10), np.uint8)
    content[:, :3] = np.frombuffer(b"B00", np.uint8)
    for column in range(9, 2, -1):
        scattered, sign = np.divmod(scattered, 36)
        content[:, column] = SIGNS[sign]
    offsets = np.arange(0, content.size + 1, 10, dtype=np.int32)
    return pa.StringArray.from_buffers(
        len(numbers), pa.py_buffer(offsets), pa.py_buffer(content.tobytes())
    )


def write_sequences(folder: Path, num_items: int) -> dict[str, Any]:
    """Shards of all splits, and what each holds."""
    drawn, _ = sample_shared(
        USERS * LENGTH, "log_uniform", num_items=num_items, seed=0, epoch=0, step=0
    )
    items = drawn.reshape(USERS, LENGTH)
    splits = {}
    for split, length in zip(SPLITS, (LENGTH - 2, LENGTH - 1, LENGTH), strict=True):
        writer = SplitWriter(
            folder,
            split,
            num_items=num_items,
            num_users=USERS,
            sequences_per_block=4096,
            sequences_per_shard=65_536,
        )
        offsets = np.arange(0, USERS * length + 1, length)
        writer.add(PackedSequences(items[:, :length].ravel(), offsets, np.arange(USERS)))
        splits[split] = writer.finish()
    return splits


def write_data(folder: Path, num_items: int) -> None:
    """Prepared data of so many items."""
    folder.mkdir(parents=True)
    schema = pa.schema(TYPES)
    with pq.ParquetWriter(folder / ITEMS_NAME, schema) as file:
        for start in range(1, num_items + 1, ROWS):
            numbers = np.arange(start, min(start + ROWS, num_items + 1))
            counts = 1 + 10**7 // numbers
            columns = [numbers, raw_ids(numbers), pa.nulls(len(numbers), pa.string()), counts]
            file.write_table(pa.table(columns, schema))
    users = {
        "user_index": np.arange(USERS),
        "user_id": [f"u{n}" for n in range(USERS)],
        "length": np.full(USERS, LENGTH),
    }
    pq.write_table(pa.table(users), folder / USERS_NAME)
    report = PrepareReport(
        rows_read=USERS * LENGTH,
        duplicates_dropped=0,
        core_rounds=(),
        ties=0,
        train_only_users=0,
        short_train_sequences=0,
        cold_targets={},
    )
    manifest = Manifest(
        num_users=USERS,
        num_items=num_items,
        num_interactions=USERS * LENGTH,
        splits=write_sequences(folder, num_items),
        source=SourceInfo(file="drawn", bytes=0, sha256=""),
        prepare=PrepareConfig(),
        report=report,
        files={name: file_sha256(folder / name) for name in (ITEMS_NAME, USERS_NAME)},
    )
    (folder / MANIFEST_NAME).write_text(manifest.sealed().model_dump_json())


def run_config(folder: Path) -> RunConfig:
    """A bare backbone on the data, which ranks 100 users at a time."""
    values = {
        "data": {"path": str(folder), "max_len": 50},
        "mltfr": {"enabled": False},
        "evaluation": {"batch_size": ASKED},
    }
    return validate(RunConfig, values, source="the benchmark")


def asked_ids(num_items: int) -> list[list[str]]:
    """Histories of 50 ids, anywhere in the catalogue."""
    drawn = np.random.default_rng(0).integers(1, num_items + 1, (ASKED, 50))
    return [raw_ids(row).to_pylist() for row in drawn]


def mapped(items: ItemMap, histories: list[list[str]]) -> None:
    """Ids to numbers, and back."""
    numbers = np.array(encode(histories, items).numbers)
    assert items.ids.at(numbers.ravel()) == [raw for row in histories for raw in row]


def placed_by_popularity(folder: Path, config: RunConfig, num_items: int) -> None:
    """100 users among the items by what training holds."""
    scorer = popularity(training_sequences(folder, read_manifest(folder)), num_items)
    batch = next(iter(ranking_stream(config, "valid", ALONE)))
    scorer.count(batch, excluded(batch, filter_seen=True))


def answered_by_popularity(items: ItemMap) -> None:
    """100 histories that are empty."""
    histories = encode([[]] * ASKED, items)
    candidates = Candidates.of(items, histories, None, None, True, "popular")
    left_out = candidates.left_out(range(ASKED))
    best_items(torch.ones(ASKED, 1), candidates.popularity()[:, None], 10, left_out, None)


def seen_items(config: RunConfig) -> None:
    """What is no competitor of the targets of a whole split."""
    for batch in ranking_stream(config, "valid", ALONE):
        excluded(batch, filter_seen=True)


def measured(call: Callable[[], Any], name: str) -> Any:
    """What ``call`` returns; its time and memory are printed."""
    forget_peak_memory()
    before, started, used = peak_memory_bytes(), time.perf_counter(), time.process_time()
    result = call()
    figures = {
        "name": name,
        "seconds": time.perf_counter() - started,
        "processor": time.process_time() - used,
        "bytes": peak_memory_bytes() - before,
    }
    print(json.dumps(figures), flush=True)
    return result


def of_map(folder: Path, config: RunConfig, num_items: int) -> None:
    """What is asked of the map, one after the other; memory is what each adds."""
    histories = asked_ids(num_items)
    items = measured(lambda: load_items(config), "the map opened and compared with its hash")
    measured(lambda: mapped(items, histories), "100 histories of 50 to numbers and back")
    measured(lambda: mapped(items, histories), "the same again")
    measured(lambda: answered_by_popularity(items), "100 empty histories answered")


def of_data(call: Callable[..., Any], name: str) -> Callable[[Path, RunConfig, int], None]:
    """``call``, measured."""
    return lambda folder, config, num_items: measured(lambda: call(folder, config, num_items), name)


WAYS: tuple[Callable[[Path, RunConfig, int], None], ...] = (
    of_map,
    of_data(placed_by_popularity, "100 users placed by popularity"),
    of_data(lambda _, config, __: seen_items(config), "seen items of 100,000 users"),
    of_data(
        lambda folder, config, _: training_slices(config, read_manifest(folder)),
        "slices of the test metrics",
    ),
    of_data(lambda folder, *_: inspect(folder, folder / "plots"), "`mltfr inspect` with plots"),
)


def main() -> None:
    """Measure each way in a process of its own and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the data, which is written if missing")
    parser.add_argument("--items", type=int, default=10**8)
    parser.add_argument("--way", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.way is not None:
        return WAYS[options.way](options.folder, run_config(options.folder), options.items)
    if not options.folder.exists():
        write_data(options.folder, options.items)
    print(f"| {options.items:,} items | s | processor, s | MiB more |\n|---|---|---|---|")
    for way in range(len(WAYS)):
        command = [sys.executable, *sys.argv, "--way", str(way)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        for result in map(json.loads, done.stdout.splitlines()):
            print(
                f"| {result['name']} | {result['seconds']:.1f} | {result['processor']:.1f} | "
                f"{result['bytes'] / 2**20:,.0f} |",
                flush=True,
            )
    return None


if __name__ == "__main__":
    main()
