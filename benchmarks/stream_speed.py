"""Sequences a second as ready batches, from local shards, in one process: this stream, plain
WebDataset and two peers' loaders.

# 300,000 sequences of 51 items, batch 1024, length 50
python benchmarks/stream_speed.py
# also: into the middle of an epoch of 1e8 (1.5 GB of disk)
python benchmarks/stream_speed.py --resume 1e8
# also: the share of time that training waits for data
python benchmarks/stream_speed.py --wait data/ml-100k
python benchmarks/stream_speed.py --recbole-python rb/bin/python --rectools-python rt/bin/python

Seconds are of wall time and, beside it, of the processor: on a shared machine the second says what
the first would be. The peers' pins (numpy below 2) conflict with this package's, so each has an
environment of its own (see peer_loaders.py):

python3.11 -m venv rb
rb/bin/pip install torch==2.13.0 numpy==1.26.4 pandas==2.3.3 scipy scikit-learn tensorboard pyyaml
texttable psutil tqdm rb/bin/pip install colorlog==4.7.2 colorama==0.4.4 && rb/bin/pip install
--no-deps recbole==1.2.1 thop python3.11 -m venv rt && rt/bin/pip install 'rectools[torch]==0.19.0'
torch==2.13.0
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import torch
import webdataset

from mltfr_dist.config import DataConfig, PrepareConfig
from mltfr_dist.data.shards.manifest import (
    MANIFEST_NAME,
    Manifest,
    PrepareReport,
    SourceInfo,
    SplitInfo,
    load_manifest,
)
from mltfr_dist.data.shards.packed import PackedSequences
from mltfr_dist.data.shards.reader import read_shard
from mltfr_dist.data.shards.writer import SplitWriter
from mltfr_dist.data.stream.training import BatchLayout, TrainStream

NUM_ITEMS = 60_000
COMMON_BATCH = 1024
"""Batch size at which all are compared."""
PEER_SEQUENCES = {"recbole": 4_000, "rectools": 40_000}
"""Few, for they are slow, and RecBole stores each prefix padded to the full length."""
PREFIXES = 48
"""Samples that RecBole trains on from a sequence of 51 items: a prefix before each item but the
first and the two held out.
"""


def write_data(folder: Path, num_sequences: int, length: int) -> None:
    """A prepared folder with random training sequences, and nothing to rank."""
    folder.mkdir(parents=True)
    sizes = {"sequences_per_block": 4096, "sequences_per_shard": 65536}
    writer = SplitWriter(folder, "train", num_items=NUM_ITEMS, num_users=num_sequences, **sizes)
    random = np.random.default_rng(0)
    for start in range(0, num_sequences, 65536):
        users = np.arange(start, min(start + 65536, num_sequences))
        items = random.integers(1, NUM_ITEMS + 1, len(users) * length)
        writer.add(PackedSequences(items, np.arange(0, len(items) + 1, length), users))
    train, empty = writer.finish(), SplitInfo(num_sequences=0, num_items=0, max_length=0, shards=())
    report = PrepareReport(
        rows_read=0,
        duplicates_dropped=0,
        core_rounds=(),
        ties=0,
        train_only_users=0,
        short_train_sequences=0,
        cold_targets={},
    )
    manifest = Manifest(
        num_users=num_sequences,
        num_items=NUM_ITEMS,
        num_interactions=num_sequences * length,
        splits={"train": train, "valid": empty, "test": empty},
        source=SourceInfo(file="random", bytes=0, sha256=""),
        prepare=PrepareConfig(),
        report=report,
        files={},
    )
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json())


def ours(folder: Path, batch_size: int, workers: int) -> Iterator[int]:
    """Sequences of each batch of an epoch."""
    config = DataConfig(path=folder, max_len=50, num_workers=workers)
    for step in TrainStream(
        folder, config, BatchLayout(0, 1, batch_size, batch_size), seed=0
    ).epoch(0):
        yield step.num_sequences


def plain_webdataset(folder: Path, batch_size: int, num_sequences: int) -> Iterator[int]:
    """One sample a member, shuffled in a buffer, padded and batched: the usual pipeline."""
    path = folder / "plain.tar"
    if not path.exists():
        random = np.random.default_rng(0)
        with path.open("wb") as stream, webdataset.TarWriter(stream, encoder=False) as tar:
            for number in range(num_sequences):
                buffer = io.BytesIO()
                np.save(buffer, random.integers(1, NUM_ITEMS + 1, 51).astype(np.uint16))
                tar.write({"__key__": f"{number:08d}", "items.npy": buffer.getvalue()})

    def to_batch(samples: list[tuple[np.ndarray]]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = np.zeros((len(samples), 51), dtype=np.int64)
        for row, (items,) in zip(rows, samples, strict=True):
            row[: len(items)] = items
        return torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())

    data = (
        webdataset.WebDataset(str(path), shardshuffle=False)
        .shuffle(1000)
        .decode()
        .to_tuple("items.npy")
    )
    for history, _ in data.batched(batch_size, collation_fn=to_batch):
        yield len(history)


def measure(name: str, batches: Iterable[int]) -> float:
    """Print and return sequences a second of the processor."""
    wall, processor = time.perf_counter(), time.process_time()
    total = sum(batches)
    return report(name, total, time.perf_counter() - wall, time.process_time() - processor)


def report(name: str, total: int, wall: float, processor: float) -> float:
    """Print a line; returns how many a second of the processor."""
    print(f"{name:<44}{total:>12,}{total / wall:>14,.0f}{total / processor:>18,.0f}", flush=True)
    return total / processor


def measure_peer(name: str, python: Path, folder: Path) -> float:
    """Run a peer's loader over the first sequences of ``folder``; returns sequences a
    processor-second.
    """
    manifest, few = load_manifest(folder), PEER_SEQUENCES[name]
    first = read_shard(
        folder, manifest.splits["train"].shards[0], num_items=manifest.num_items
    ).run(0, few)
    path = folder.parent / f"{name}.npy"
    np.save(path, first.items.reshape(len(first), -1))
    script = Path(__file__).with_name("peer_loaders.py")
    command = [str(python), "-I", str(script), name, str(path), str(COMMON_BATCH)]
    result = json.loads(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[
            -1
        ]
    )
    samples, wall, processor = result["samples"], result["wall"], result["processor"]
    if name == "recbole":
        report(f"recbole, samples (prefixes), batch {COMMON_BATCH}", samples, wall, processor)
        samples //= PREFIXES
    return report(f"{name}, whole sequences, batch {COMMON_BATCH}", samples, wall, processor)


def resume(folder: Path, num_sequences: int, batch_size: int) -> None:
    """Time to the first batch from the middle of an epoch of short sequences."""
    if not folder.exists():
        write_data(folder, num_sequences, 2)
    process = psutil.Process()
    started, read = time.perf_counter(), process.io_counters().read_chars
    stream = TrainStream(
        folder, DataConfig(path=folder), BatchLayout(0, 1, batch_size, batch_size), seed=0
    )
    middle = stream.steps_per_epoch // 2
    next(stream.epoch(0, middle))
    seconds, read = time.perf_counter() - started, process.io_counters().read_chars - read
    of = sum(path.stat().st_size for path in folder.iterdir())
    print(
        f"resumed at step {middle:,} of {stream.steps_per_epoch:,}, {num_sequences:,} sequences: "
        f"{seconds:.2f} s"
    )
    print(f"read {read / 1e6:,.1f} MB of {of / 1e6:,.1f} MB, manifest included")


def wait_share(folder: Path, batch_size: int, steps: int) -> None:
    """Share of an epoch of bare SASRec that passes in the stream."""
    from mltfr_dist.config import RunConfig
    from mltfr_dist.schema import validate
    from mltfr_dist.training.build import build_model
    from mltfr_dist.training.inputs import load_inputs

    values = {
        "data": {"path": str(folder)},
        "mltfr": {"enabled": False},
        "training": {"global_batch_size": batch_size},
    }
    config = validate(RunConfig, values, source="the benchmark")
    model = build_model(config, load_inputs(config), with_consensus=False)
    optimizer = torch.optim.AdamW(model.parameters())
    waited = worked = 0.0
    batches = islice(
        TrainStream(folder, config.data, BatchLayout(0, 1, batch_size, batch_size), seed=0).epoch(
            0
        ),
        steps,
    )
    while True:
        started = time.process_time()
        step = next(batches, None)
        waited += time.process_time() - started
        if step is None:
            break
        started = time.process_time()
        (model(step.micro_batches[0]).terms["loss"].sum.sum() / step.num_targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        worked += time.process_time() - started
    print(
        f"bare SASRec on {folder}, batch {batch_size}: {waited / (waited + worked):.2%} of the "
        f"time goes into the data"
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("data/speed"))
    parser.add_argument("--sequences", type=float, default=300_000)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument(
        "--recbole-python", type=Path, help="Python of an environment that has RecBole"
    )
    parser.add_argument(
        "--rectools-python", type=Path, help="Python of an environment that has RecTools"
    )
    parser.add_argument("--resume", type=float, help="sequences of the epoch to resume in")
    parser.add_argument("--wait", type=Path, help="prepared folder to train on")
    options = parser.parse_args()
    num_sequences = int(options.sequences)
    data = options.folder / f"packed-{num_sequences}"
    if not data.exists():
        write_data(data, num_sequences, 51)
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    print(f"{'':<44}{'sequences':>12}{'a second':>14}{'a processor-second':>18}")
    sum(
        ours(data, 4096, options.workers)
    )  # what a first epoch alone pays: imports, and files not yet in memory
    speeds = {}
    for batch_size in sorted({*options.batch_sizes, COMMON_BATCH}):
        speeds[batch_size] = measure(
            f"this stream, batch {batch_size}", ours(data, batch_size, options.workers)
        )
    few = min(num_sequences, 20_000)
    batches = plain_webdataset(options.folder, COMMON_BATCH, few)
    others = {
        "webdataset": measure(f"WebDataset, one sample a member, batch {COMMON_BATCH}", batches)
    }
    for name, python in (
        ("recbole", options.recbole_python),
        ("rectools", options.rectools_python),
    ):
        if python is None:
            print(f"{name:<44}not measured: give --{name}-python")
        else:
            others[name] = measure_peer(name, python, data)
    for name, speed in others.items():
        print(f"{'ratio to ' + name:<44}{speeds[COMMON_BATCH] / speed:>12,.0f} x")
    if options.wait:
        wait_share(options.wait, 256, 100)
    if options.resume:
        place = options.folder / f"short-{int(options.resume)}"
        resume(place, int(options.resume), 256)
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
