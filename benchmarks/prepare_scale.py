"""How fast interactions are prepared, in how much memory, and whether the memory limit shows in the
bytes (it must not).

# about 10 GB of disk under --folder
python benchmarks/prepare_scale.py --interactions 1e8 --users 1e7 --memory 3GB

Items follow a power law, users are uniform, times are random; the file is Parquet with integer ids.
The peak is that of the whole process tree of `mltfr prepare` (resident memory, sampled), so it
counts what DuckDB's own limit does not.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

ROWS_PER_GROUP = 1_000_000


def write_interactions(
    path: Path, num_interactions: int, num_users: int, num_items: int, exponent: float
) -> None:
    """A Parquet file of synthetic interactions; the item of rank r is drawn with probability ~ r **
    -exponent.
    """
    random = np.random.default_rng(0)
    share = np.cumsum(np.arange(1, num_items + 1) ** -exponent)
    schema = pa.schema(
        [("user_id", pa.int64()), ("item_id", pa.int64()), ("timestamp", pa.int64())]
    )
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, num_interactions, ROWS_PER_GROUP):
            rows = min(ROWS_PER_GROUP, num_interactions - start)
            items = np.searchsorted(share, random.random(rows) * share[-1])
            columns = [
                random.integers(0, num_users, rows),
                items * 7919 % 1_000_003,
                random.integers(1.5e9, 1.7e9, rows),
            ]
            writer.write_table(pa.table(columns, schema=schema))


def prepare(source: Path, output: Path, memory: str) -> tuple[float, float]:
    """Run the real command; returns seconds and the peak of resident memory in GiB."""
    shutil.rmtree(output, ignore_errors=True)
    command = [
        sys.executable,
        "-c",
        "import sys; from mltfr_dist.cli import main; sys.exit(main())",
        "prepare",
        str(source),
        str(output),
        "--memory-limit",
        memory,
    ]
    started, peak = time.monotonic(), 0
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            try:
                family = [
                    psutil.Process(process.pid),
                    *psutil.Process(process.pid).children(recursive=True),
                ]
                peak = max(peak, sum(member.memory_info().rss for member in family))
            except psutil.NoSuchProcess:
                continue
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(process.returncode)
    return time.monotonic() - started, peak / 2**30


def digest(folder: Path) -> str:
    """One hash of the names and contents of all files."""
    state = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        state.update(path.name.encode())
        with path.open("rb") as file:
            state.update(hashlib.file_digest(file, "sha256").digest())
    return state.hexdigest()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("data/scale"))
    parser.add_argument("--interactions", type=float, default=1e6)
    parser.add_argument("--users", type=float, default=1e5)
    parser.add_argument("--items", type=float, default=1e6)
    parser.add_argument("--exponent", type=float, default=1.0)
    parser.add_argument("--memory", nargs="+", default=["256MB", "8GB"], help="limits to compare")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = int(options.interactions)
    source = options.folder / f"interactions-{rows}.parquet"
    if not source.exists():
        write_interactions(source, rows, int(options.users), int(options.items), options.exponent)
    print(
        f"{rows:,} interactions, {source.stat().st_size / 1e9:.2f} GB, {os.cpu_count()} cores, "
        f"load {os.getloadavg()[0]:.1f}"
    )
    results = []
    for memory in options.memory:
        output = options.folder / "prepared"
        seconds, peak = prepare(source, output, memory)
        results.append((memory, seconds, peak, digest(output)))
        shutil.rmtree(output)
    print(f"{'limit':>8}{'seconds':>10}{'interactions/s':>16}{'peak GiB':>10}  sha256 of all files")
    for memory, seconds, peak, sha256 in results:
        print(f"{memory:>8}{seconds:>10.1f}{rows / seconds:>16,.0f}{peak:>10.2f}  {sha256[:16]}")
    if len({result[-1] for result in results}) > 1:
        raise SystemExit("The memory limit shows in the bytes.")


if __name__ == "__main__":
    main()
