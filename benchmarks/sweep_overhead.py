"""What a sweep costs beyond its runs: its wall time against that of the same runs started by hand,
one after the other.

Both train the same configurations on one worker, one at a time, in turn, round by round; the start
of Ray is measured by itself, and left out of the ratio, as it is paid once.

    python benchmarks/sweep_overhead.py --data data/ml-100k --tables data/tables
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent

START_RAY = """
from mltfr_dist.tuning.environment import LOOPBACK, set_environment
set_environment(LOOPBACK)
import ray
from mltfr_dist.tuning.own_ray import start_own_ray
start_own_ray()
ray.shutdown()
"""


def space(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """A sweep that neither stops trials early nor runs final seeds."""
    return {
        "name": "overhead",
        "sweeps_dir": str(folder / "sweeps"),
        "preset": "demo",
        "overrides": {
            "data.path": str(options.data),
            "mltfr.tables": sorted(str(p) for p in options.tables.iterdir()),
            "training.epochs": options.epochs,
            "training.consensus_epochs": 1,
        },
        "search": {"mltfr.consensus.weight": {"choices": [0.1 * i for i in range(options.trials)]}},
        "algorithm": "grid",
        "scheduler": "none",
        "max_concurrent": 1,
        "final_seeds": [],
    }


def timed(*command: str) -> float:
    """Wall seconds of a command that must succeed."""
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout[-2000:] + done.stderr[-4000:])
    return time.monotonic() - started


def main() -> None:
    """Measure both and print the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tables", type=Path, required=True, help="folder of token tables")
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    totals = {"start of Ray": 0.0, "sweep, without it": 0.0, "the same runs by train.py": 0.0}
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "space.yaml"
            path.write_text(yaml.safe_dump(space(options, Path(scratch))))
            ray_seconds = timed(sys.executable, "-c", START_RAY)
            sweep = timed(sys.executable, "tuning/sweep.py", str(path)) - ray_seconds
            runs = 0.0
            for config in sorted((Path(scratch) / "sweeps/overhead/trials").glob("*/config.yaml")):
                runs += timed(
                    sys.executable,
                    "train.py",
                    "--config",
                    str(config),
                    f"runs_dir={scratch}/by-hand",
                )
        for name, seconds in zip(totals, (ray_seconds, sweep, runs), strict=True):
            totals[name] += seconds
            print(f"{name:27} {seconds:7.1f} s", flush=True)
    overhead = totals["sweep, without it"] / totals["the same runs by train.py"] - 1
    print(f"overhead of {options.rounds} sweeps of {options.trials} trials: {overhead:.1%}")


if __name__ == "__main__":
    main()
