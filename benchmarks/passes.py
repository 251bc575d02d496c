"""What a run spends beside its steps: validation, checkpoints and the Fisher pass, in epochs.

    python benchmarks/passes.py --preset sasrec_beauty data.path=data/beauty
    python benchmarks/passes.py --preset demo training.epochs=2 training.consensus_epochs=1

Processor time of this process within one run, which a shared machine sways less than the clock; one
rank. A pass is given as its share of the mean training epoch of its stage, the Fisher pass of that
of the first.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mltfr_dist.errors import MltfrError, fail
from mltfr_dist.resolve import resolve_config
from mltfr_dist.schema import changed
from mltfr_dist.training.running import loop, stages
from mltfr_dist.training.running.fit import fit

PASSES = {"train_epoch": loop, "validate": loop, "save_checkpoint": loop, "consensus_core": stages}
"""Function to the module that calls it by that name."""


def watch(spent: dict[str, list[float]]) -> None:
    """Let each pass note the processor seconds that it takes."""
    for name, module in PASSES.items():
        setattr(module, name, timed(name, getattr(module, name), spent))


def timed(name: str, call: Callable[..., Any], spent: dict[str, list[float]]) -> Callable[..., Any]:
    """``call``, which notes what it takes."""

    def noting(*arguments: Any) -> Any:
        started = time.process_time()
        result = call(*arguments)
        spent[name].append(time.process_time() - started)
        return result

    return noting


def shares(spent: dict[str, list[float]]) -> dict[str, float]:
    """Mean seconds of a training epoch, and of each pass in such epochs.

    The first epoch is left out where there is another: it warms up.
    """
    epochs = spent["train_epoch"][1:] or spent["train_epoch"]
    epoch = sum(epochs) / len(epochs)
    others = {name: values for name, values in spent.items() if name != "train_epoch"}
    return {"epoch_seconds": epoch} | {
        name: sum(values) / len(values) / epoch for name, values in others.items()
    }


def main() -> int:
    """Train and print; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    options = parser.parse_args()
    spent: dict[str, list[float]] = defaultdict(list)
    watch(spent)
    try:
        with tempfile.TemporaryDirectory() as folder:
            base = resolve_config(options.preset, None, options.overrides)
            config = changed(base, {"runs_dir": folder, "baselines": ()}, source="the benchmark")
            fit(config, read_test=False)
    except MltfrError as error:
        return fail(error)
    result = shares(spent)
    print(json.dumps(result, indent=2))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
