"""Histories by the hundred thousand through `mltfr recommend --histories`: rate, memory, a kill.

    python benchmarks/score_many.py /tmp/score --counts 10000 100000 1000000 --kill
    python benchmarks/score_many.py /tmp/score --model runs/demo --counts 100000

A bare SASRec (64 numbers, 2 blocks, 50 positions) over 10,000 synthetic items is trained for one
short epoch and exported, unless a model is given. Histories are drawn uniformly, of 5 to 20 items;
each count is a process of its own, whose peak is what the kernel says of it (at least what this
process held when it started it: repeat the first count once the model is there). `--kill` scores
the last count once more, kills the command (SIGKILL) when a third of the parts is there and again
at two thirds, and compares the output, user by user, with that of the call that was not killed.
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
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

NUM_ITEMS, AT_ONCE, K = 10_000, 50_000, 10


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


def timed(arguments: list[str]) -> tuple[float, float, float]:
    """Seconds by the clock, of processor time, and peak GiB of a command that ends well."""
    began, process = time.monotonic(), subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}")
    seconds = time.monotonic() - began
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def killed_and_resumed(arguments: list[str], output: Path, count: int) -> list[int]:
    """Kill the command at one and at two thirds of its parts; how many were there at each kill."""
    blocks, num_parts, there = output.with_name(f".parts-{output.name}"), -(-count // 1024), []
    for share in (1 / 3, 2 / 3):
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
        while len(list(blocks.glob("part-*.parquet"))) < num_parts * share:
            if process.poll() is not None:
                raise SystemExit("the command ended before it was killed")
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
        there.append(len(list(blocks.glob("part-*.parquet"))))
    timed(arguments)
    return there


def equal(output: Path, other: Path) -> bool:
    """Whether both hold the same rows in the same order, a row group at a time."""
    mine, theirs = pq.ParquetFile(output), pq.ParquetFile(other)
    return mine.num_row_groups == theirs.num_row_groups and all(
        mine.read_row_group(n).equals(theirs.read_row_group(n)) for n in range(mine.num_row_groups)
    )


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
    parser.add_argument("--kill", action="store_true", help="also kill and resume the last count")
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
        seconds, busy, peak = timed(command(model, histories, output))
        users = pq.read_table(output, columns=["user_id"])["user_id"].to_numpy()
        assert (users == np.arange(count)).all(), "a user is missing, twice or out of order"
        print(
            f"{count:,} users: {seconds:,.0f} s, {count / seconds:,.0f} a second "
            f"({count / busy:,.0f} a second of processor time), "
            f"peak {peak:.2f} GiB, load {os.getloadavg()[0]:.1f}",
            flush=True,
        )
    if options.kill:
        again = folder / "again.parquet"
        forget(again)
        there = killed_and_resumed(command(model, histories, again), again, count)
        users = pq.read_table(again, columns=["user_id"])["user_id"].to_numpy()
        assert (users == np.arange(count)).all(), "a user is missing, twice or out of order"
        print(
            f"killed with {there[0]} and {there[1]} of {-(-count // 1024)} parts and resumed: "
            f"equal to the other call's output: {equal(output, again)}"
        )


if __name__ == "__main__":
    main()
