"""What an epoch costs: the bare backbone, MLTFR with its shortlist, and MLTFR searching every token, in one run.

The machine may be shared and noisy: read the ratios, not the seconds. Variants take turns, round by round, and the
fastest round of each counts.

    python benchmarks/epoch_time.py --data data/ml-100k --tables data/tables
    python benchmarks/epoch_time.py --data data/beauty --batch 256 --max-len 50     # bare backbone only
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

import torch

from mltfr_dist.config import RunConfig
from mltfr_dist.distributed.engine import Engine, batch_layout
from mltfr_dist.distributed.meeting import start_ranks, stop_ranks
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.distributed.resources import peak_memory_bytes
from mltfr_dist.schema import validate
from mltfr_dist.training.build import build_model
from mltfr_dist.training.inputs import load_inputs
from mltfr_dist.training.streams import train_stream


def config_for(options: argparse.Namespace, variant: str) -> RunConfig:
    """The configuration of one variant; all else is equal."""
    tables = sorted(str(p) for p in options.tables.iterdir()) if options.tables else []
    shortlist = None if variant == "exact" else options.shortlist
    return validate(
        RunConfig,
        {
            "data": {"path": str(options.data), "max_len": options.max_len},
            "mltfr": {
                "enabled": variant != "bare",
                "tables": tables,
                "filter": {"shortlist_size": shortlist},
            },
            "training": {"global_batch_size": options.batch},
        },
        source="the benchmark",
    )


def seconds(engine: Engine, config: RunConfig, epoch: int, max_steps: int) -> tuple[float, int]:
    """Wall time of an epoch's updates (at most ``max_steps``), data included."""
    started, done = time.perf_counter(), 0
    for step, batches in enumerate(train_stream(config, engine.layout).epoch(epoch)):
        if step == max_steps:
            break
        engine.update(batches, step)
        done += 1
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started, done


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--tables",
        type=Path,
        help="folder of token tables; without it only the bare backbone is measured",
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--max-len", type=int, default=100)
    parser.add_argument("--shortlist", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-steps", type=int, default=10_000)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    ranks: Ranks = start_ranks(options.threads)
    variants = ["bare", "shortlist", "exact"] if options.tables else ["bare"]
    configs = {name: config_for(options, name) for name in variants}
    engines = {}
    for name, config in configs.items():
        model = build_model(config, load_inputs(config), with_consensus=False)
        engines[name] = Engine(
            model.to(ranks.device), config, ranks, batch_layout(config, ranks), 1
        )
        seconds(engines[name], config, 0, 2)  # warm up
    best: dict[str, float] = {}
    steps = 0
    for epoch in range(1, options.rounds + 1):
        for name in variants:
            taken, steps = seconds(engines[name], configs[name], epoch, options.max_steps)
            best[name] = min(taken, best.get(name, taken))
            ranks.say(f"  round {epoch}/{options.rounds}  {name:<10} {taken:.2f} s")
    ranks.say(
        f"\n{options.data}, {steps} steps of {options.batch} sequences, {ranks.world_size} rank(s) x {torch.get_num_threads()} "
        f"threads, {torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()}, "
        f"peak {peak_memory_bytes() / 2**30:.2f} GiB"
    )
    ranks.say(f"{'variant':<10}  {'epoch':>8}  {'of bare':>8}")
    for name in variants:
        ranks.say(f"{name:<10}  {best[name]:>6.2f} s  {best[name] / best['bare']:>7.2f}x")
    stop_ranks()


if __name__ == "__main__":
    main()
