"""Histories by the hundred thousand through `mltfr recommend --histories`: rate, memory, a kill.

    python benchmarks/score_many.py /tmp/score --counts 250000 500000 1000000
    python benchmarks/score_many.py /tmp/score --model runs/demo --counts 100000

A bare SASRec (64 numbers, 2 blocks, 50 positions) over 10,000 synthetic items is trained for one
short epoch and exported, unless a model is given. Histories are drawn uniformly, of 5 to 20 items;
each count is a process of its own, whose peak is what the kernel says of it (at least what this
process held when it started it: repeat the first count once the model is there). `--kill` kills the
command (SIGKILL) when a third of the parts is there, starts it again, and compares the output with
that of a call that was not killed.
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


def killed_and_resumed(arguments: list[str], output: Path, count: int) -> str:
    """Kill the command at a third of its parts, and start it again; what was there at the kill."""
    blocks = output.with_name(f".parts-{output.name}")
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    while len(list(blocks.glob("part-*.parquet"))) < count / 1024 / 3:
        if process.poll() is not None:
            raise SystemExit("the command ended before it was killed")
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there = len(list(blocks.glob("part-*.parquet")))
    timed(arguments)
    return f"killed with {there} of {-(-count // 1024)} parts"


def forget(output: Path) -> None:
    """What an earlier measurement has left."""
    output.unlink(missing_ok=True)
    shutil.rmtree(output.with_name(f".parts-{output.name}"), ignore_errors=True)


def main() -> None:
    """Print a line a count."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where data, model and outputs go")
    parser.add_argument("--model", type=Path, help="run folder or export; without it one is made")
    parser.add_argument("--counts", type=int, nargs="+", default=[250_000, 500_000, 1_000_000])
    parser.add_argument("--kill", action="store_true", help="also kill and resume the first count")
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
        if options.kill and count == options.counts[0]:
            again = folder / "again.parquet"
            forget(again)
            told = killed_and_resumed(command(model, histories, again), again, count)
            equal = pq.read_table(output).equals(pq.read_table(again))
            print(f"{told} and resumed: equal to the other call's output: {equal}", flush=True)


if __name__ == "__main__":
    main()
