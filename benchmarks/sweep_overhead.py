"""What a sweep costs beyond its runs: its seconds, by the clock and of the processor, against those
of the same runs started by hand, one after the other.

Both train the same configurations on one worker, one at a time, in turn, round by round; the start
of Ray is measured by itself, and left out of the ratio, as it is paid once. On a machine that
others share the processor's seconds say more.

    python benchmarks/sweep_overhead.py --data data/ml-100k --tables data/tables
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import yaml

ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.1

START_RAY = """
from mltfr_dist.tuning.environment import LOOPBACK, set_environment
set_environment(LOOPBACK)
import ray
from mltfr_dist.tuning.own_ray import start_own_ray
start_own_ray()
ray.shutdown()
"""

RAY, SWEEP, RUNS = "start of Ray", "sweep, without it", "the same runs by train.py"


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


class Spent(NamedTuple):
    """Seconds."""

    clock: float = 0.0
    processor: float = 0.0

    def plus(self, other: Spent, sign: int = 1) -> Spent:
        """Both together, or their difference."""
        return Spent(self.clock + sign * other.clock, self.processor + sign * other.processor)


def timed(*command: str) -> Spent:
    """What a command that must succeed has spent, and all processes below it: Ray's do not hand
    their times on to those that started them, so they are asked as they run.
    """
    started, used = time.monotonic(), dict[int, float]()
    with tempfile.TemporaryFile("w+") as output:
        process = psutil.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        while process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                for one in (process, *process.children(recursive=True)):
                    with suppress(psutil.NoSuchProcess):
                        times = one.cpu_times()
                        used[one.pid] = times.user + times.system
            time.sleep(POLL_SECONDS)
        if process.returncode:
            output.seek(0)
            sys.exit(output.read()[-6000:])
    return Spent(time.monotonic() - started, sum(used.values()))


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
    totals = dict.fromkeys((RAY, SWEEP, RUNS), Spent())
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "space.yaml"
            path.write_text(yaml.safe_dump(space(options, Path(scratch))))
            ray = timed(sys.executable, "-c", START_RAY)
            sweep = timed(sys.executable, "tuning/sweep.py", str(path)).plus(ray, -1)
            runs = Spent()
            for config in sorted((Path(scratch) / "sweeps/overhead/trials").glob("*/config.yaml")):
                by_hand = ("--config", str(config), f"runs_dir={scratch}/by-hand")
                runs = runs.plus(timed(sys.executable, "train.py", *by_hand))
        for name, spent in zip(totals, (ray, sweep, runs), strict=True):
            totals[name] = totals[name].plus(spent)
            print(f"{name:27} {spent.clock:7.1f} s, processor {spent.processor:7.1f} s", flush=True)
    for kind in Spent._fields:
        overhead = getattr(totals[SWEEP], kind) / getattr(totals[RUNS], kind) - 1
        print(
            f"overhead of {options.rounds} sweeps of {options.trials} trials, by the {kind}: "
            f"{overhead:.1%}"
        )


if __name__ == "__main__":
    main()
