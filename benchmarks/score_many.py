"""Histories by the hundred thousand through `mltfr recommend --histories`: rate, memory, a kill.

    python benchmarks/score_many.py /tmp/score --counts 10000 100000 1000000 --kill
    python benchmarks/score_many.py /tmp/score --model runs/demo --counts 100000

A bare SASRec (64 numbers, 2 blocks, 50 positions) over 10,000 synthetic items is trained for one
short epoch and exported, unless a model is given. Histories are drawn uniformly, of 5 to 20 items;
each count is a process of its own, whose peak is what the kernel says of it (at least what this
process held when it started it: repeat the first count once the model is there). With `--kill` the
last count is killed (SIGKILL) at one and at two thirds of its parts and started again, and some
parts, spread over the file, are scored again by a call that nobody kills and must be equal.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

NUM_ITEMS, AT_ONCE, K = 10_000, 50_000, 10
PART_ROWS, SAMPLED = 1024, 20


def make_model(folder: Path) -> Path:
    """An exported bare SASRec over synthetic interactions."""
    from mltfr_dist import export, fit, prepare

    rng = np.random.default_rng(0)
    items = np.concatenate(
        [np.arange(NUM_ITEMS), rng.integers(NUM_ITEMS, size=NUM_ITEMS * 5)]
    )  # each of them at least once
    users = rng.permutation(np.arange(len(items)) % (len(items) // 12))
    events = pa.table({"user_id": users, "item_id": items, "timestamp": np.arange(len(items))})
    prepare(events, folder / "data", user_core=1, item_core=1, times="any")
    run = fit(
        "smoke",
        {
            "runs_dir": str(folder / "runs"),
            "data.path": str(folder / "data"),
            "data.max_len": 50,
            "backbone.hidden_dim": 64,
            "backbone.num_layers": 2,
            "mltfr.enabled": False,
            "mltfr.tables": [],
            "training.epochs": 1,
            "training.global_batch_size": 512,
            "baselines": [],
        },
    )
    export(run.folder, folder / "model")
    return folder / "model"


def write_histories(path: Path, item_ids: list[str], count: int) -> None:
    """A Parquet file of ``count`` users, numbered from 0."""
    rng, ids = np.random.default_rng(count), pa.array(item_ids[1:])
    schema = pa.schema({"user_id": pa.int64(), "history": pa.list_(pa.string())})
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, count, AT_ONCE):
            users = np.arange(start, min(start + AT_ONCE, count))
            ends = np.cumsum([0, *rng.integers(5, 21, len(users))])
            items = ids.take(pa.array(rng.integers(len(ids), size=ends[-1])))
            lists = pa.ListArray.from_arrays(pa.array(ends, pa.int32()), items)
            writer.write_table(pa.table({"user_id": users, "history": lists}, schema))


def command(model: Path, histories: Path, output: Path) -> list[str]:
    """What a person would type."""
    options = ["--histories", str(histories), "--output", str(output), "--k", str(K)]
    return [sys.executable, "-m", "mltfr_dist", "recommend", str(model), *options]


class Cost(NamedTuple):
    """Of a command, all its starts together."""

    seconds: float
    busy: float
    """Seconds of processor time."""
    peak: float
    """GiB of the start that held most."""


def timed(arguments: list[str], until: Callable[[], bool] | None = None) -> Cost:
    """A command that ends well, or is killed as soon as ``until`` holds."""
    began, process = time.monotonic(), subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    if until:
        while not until():
            assert process.poll() is None, "the command ended before it was killed"
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != (-signal.SIGKILL if until else 0):
        raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}")
    seconds = time.monotonic() - began
    return Cost(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20)


def killed_twice(arguments: list[str], output: Path, count: int) -> Cost:
    """The command, killed at one and at two thirds of its parts, and started again."""
    blocks, num_parts = output.with_name(f".parts-{output.name}"), -(-count // PART_ROWS)

    def written() -> int:
        return len(list(blocks.glob("part-*.parquet")))

    costs = []
    for third in (1, 2):
        costs.append(timed(arguments, lambda least=third * num_parts / 3: written() >= least))
        print(f"killed with {written()} of {num_parts} parts", flush=True)
    costs.append(timed(arguments))
    seconds, busy, peaks = zip(*costs, strict=True)
    return Cost(sum(seconds), sum(busy), max(peaks))


def check_sample(model: Path, histories: Path, output: Path) -> str:
    """Score some parts again, by themselves, and compare them row by row."""
    whole = pq.read_table(histories)
    starts = range(0, len(whole), max(1, len(whole) // PART_ROWS // SAMPLED) * PART_ROWS)
    sample, again = (output.with_name(f"{name}-{output.name}") for name in ("sample", "again"))
    pq.write_table(pa.concat_tables([whole.slice(n, PART_ROWS) for n in starts]), sample)
    forget(again)
    timed(command(model, sample, again))
    written = pq.read_table(output)
    expected = pa.concat_tables([written.slice(n, PART_ROWS) for n in starts])
    assert pq.read_table(again).equals(expected), "killed and resumed, some users differ"
    return f"{len(expected):,} users in {len(starts)} parts, scored by themselves: equal to the bit"


def forget(output: Path) -> None:
    """What an earlier measurement has left."""
    output.unlink(missing_ok=True)
    shutil.rmtree(output.with_name(f".parts-{output.name}"), ignore_errors=True)


def main() -> None:
    """Print a line a count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where data, model and outputs go")
    parser.add_argument("--model", type=Path, help="run folder or export; without it one is made")
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--kill", action="store_true", help="kill and resume the last count")
    options = parser.parse_args()
    folder = options.folder
    model = options.model or folder / "model"
    if not model.exists():
        make_model(folder)
    import mltfr_dist

    item_ids = mltfr_dist.load(model).item_ids
    print(f"{platform.machine()}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    for count in options.counts:
        histories, output = folder / f"users-{count}.parquet", folder / f"recs-{count}.parquet"
        write_histories(histories, item_ids, count)
        forget(output)
        kill = options.kill and count == options.counts[-1]
        arguments = command(model, histories, output)
        cost = killed_twice(arguments, output, count) if kill else timed(arguments)
        users = pq.read_table(output, columns=["user_id"])["user_id"].to_numpy()
        assert np.array_equal(users, np.arange(count)), "a user is missing, twice or out of order"
        print(
            f"{count:,} users, each once: {cost.seconds:,.0f} s, {count / cost.seconds:,.0f} a "
            f"second ({count / cost.busy:,.0f} a second of processor time), "
            f"peak {cost.peak:.2f} GiB, load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
        if kill:
            print(check_sample(model, histories, output))


if __name__ == "__main__":
    main()
