"""What `mltfr prepare` takes of the time that plain scripts take for the same without its checks.

The scripts read a file, drop duplicates, filter to a 5-core until that is stable, map ids, order by
time, split leave-one-out and write Parquet: one in DuckDB, one in Polars, each a process of its
own, in turn with the command, by clock and processor. Prints JSON.

    python benchmarks/prepare.py --rows 5e6 --rounds 3          # 1 GB of disk under --folder
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from prepare_scale import write_interactions

CORE = 5

DUCKDB = """
import sys
import duckdb
source, output, core = sys.argv[1], sys.argv[2], int(sys.argv[3])
db = duckdb.connect()
db.execute(f"CREATE TABLE rows AS SELECT DISTINCT user_id::VARCHAR AS user_id, "
           f"item_id::VARCHAR AS item_id, timestamp::BIGINT AS timestamp FROM '{source}'")
while True:
    before = db.execute("SELECT count(*) FROM rows").fetchone()
    for key in ("item_id", "user_id"):
        db.execute(f"CREATE OR REPLACE TABLE rows AS SELECT * FROM rows WHERE {key} IN "
                   f"(SELECT {key} FROM rows GROUP BY {key} HAVING count(*) >= {core})")
    if db.execute("SELECT count(*) FROM rows").fetchone() == before:
        break
for key in ("item", "user"):
    db.execute(f"CREATE TABLE {key}s AS SELECT {key}_id, row_number() OVER (ORDER BY {key}_id) "
               f"AS {key} FROM (SELECT DISTINCT {key}_id FROM rows)")
    db.execute(f"COPY {key}s TO '{output}/{key}s.parquet'")
db.execute("CREATE TABLE lists AS SELECT user, list(item ORDER BY timestamp) AS items "
           "FROM rows JOIN items USING (item_id) JOIN users USING (user_id) GROUP BY user")
for split, less in (("train", 2), ("valid", 1), ("test", 0)):
    db.execute(f"COPY (SELECT user, items[:len(items) - {less}] AS items FROM lists ORDER BY user)"
               f" TO '{output}/{split}.parquet'")
"""

POLARS = """
import sys
import polars as pl
source, output, core = sys.argv[1], sys.argv[2], int(sys.argv[3])
read = pl.scan_csv if source.endswith(".csv") else pl.scan_parquet
text = [pl.col(key).cast(pl.String) for key in ("user_id", "item_id")]
rows = read(source).with_columns(text).unique().collect()
while True:
    before = len(rows)
    for key in ("item_id", "user_id"):
        rows = rows.filter(pl.len().over(key) >= core)
    if len(rows) == before:
        break
for key in ("item", "user"):
    ids = rows.select(f"{key}_id").unique().sort(f"{key}_id").with_row_index(key, 1)
    ids.write_parquet(f"{output}/{key}s.parquet")
    rows = rows.join(ids, on=f"{key}_id")
lists = rows.sort("user", "timestamp").group_by("user", maintain_order=True).agg("item")
for split, less in (("train", 2), ("valid", 1), ("test", 0)):
    cut = pl.col("item").list.head(pl.col("item").list.len() - less)
    lists.select("user", cut).write_parquet(f"{output}/{split}.parquet")
"""

COMMAND = "import sys; from mltfr_dist.cli import main; sys.exit(main())"


def spent(source: Path, output: Path, name: str) -> tuple[float, float]:
    """Seconds by the clock and of the processor that one of the three takes."""
    shutil.rmtree(output, ignore_errors=True)
    if name == "mltfr prepare":
        command = [sys.executable, "-c", COMMAND, "prepare", str(source), str(output)]
        command += ["--user-core", str(CORE), "--item-core", str(CORE)]
    else:
        output.mkdir()
        script = DUCKDB if name == "DuckDB" else POLARS
        command = [sys.executable, "-c", script, str(source), str(output), str(CORE)]
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def write_csv(parquet: Path, path: Path) -> None:
    """The same rows as text."""
    import duckdb

    duckdb.connect().execute(f"COPY (FROM '{parquet}') TO '{path}' (HEADER)")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=float, default=5e6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="for data; default: a temporary one")
    options = parser.parse_args()
    names = ("mltfr prepare", "DuckDB", "Polars")
    if options.folder:
        options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder, rows = Path(scratch), int(options.rows)
        write_interactions(folder / "rows.parquet", rows, rows // 50, rows // 250, 1.0)
        write_csv(folder / "rows.parquet", folder / "rows.csv")
        results: dict[str, object] = {"rows": rows, "rounds": options.rounds}
        for kind in ("csv", "parquet"):
            turns = [
                {name: spent(folder / f"rows.{kind}", folder / "output", name) for name in names}
                for _ in range(options.rounds)
            ]
            for which, clock in enumerate(("clock", "processor")):
                middle = {
                    name: statistics.median(turn[name][which] for turn in turns) for name in names
                }
                results[f"{kind}, {clock}"] = {
                    **{f"{name}, s": round(value, 2) for name, value in middle.items()},
                    **{
                        f"of {name}": round(middle[names[0]] / middle[name], 2)
                        for name in names[1:]
                    },
                }
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
