"""Item tables of up to 10^7 x 64 under a loss that samples items: time of a step, memory, and bytes
that cross ranks.

A bare SASRec on random batches, by size of the table, dense or sparse item gradients, and number of
ranks; each in processes of its own, with one thread a rank. Also ranks a few users among all items,
which needs memory for their scores. A case whose memory, extrapolated from the smaller table,
exceeds the limit is not run.

    python benchmarks/item_tables.py
    # a table that is divided over the ranks: see item_rows.py
    python benchmarks/item_tables.py rows
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from scaling import count_collectives
from support import REPOSITORY, clean_environment, torchrun

from mltfr_dist.config import RunConfig
from mltfr_dist.data.batch import RankingBatch, SequenceBatch
from mltfr_dist.data.stream.negatives import sample_shared
from mltfr_dist.data.stream.training import StepBatches
from mltfr_dist.distributed.engine import Engine, batch_layout
from mltfr_dist.distributed.meeting import leave, start_ranks, stop_ranks
from mltfr_dist.distributed.resources import peak_memory_bytes
from mltfr_dist.schema import validate
from mltfr_dist.spec import ModelSpec
from mltfr_dist.training.evaluating.rankers import ByModel, excluded

GIB = 2**30


def random_step(options: argparse.Namespace, step: int, rank: int, world_size: int) -> StepBatches:
    """Histories near Zipf's law, and negatives that all ranks share."""
    size, length, items = options.batch, options.max_len, options.items
    drawn, _ = sample_shared(
        size * (length + 1), "log_uniform", num_items=items, seed=rank, epoch=0, step=step
    )
    histories = torch.from_numpy(drawn).view(size, length + 1)
    ids, log_probability = sample_shared(
        options.negatives, "uniform", num_items=items, seed=1 << 40, epoch=0, step=step
    )
    batch = SequenceBatch(
        histories[:, :-1].contiguous(),
        histories[:, 1:].contiguous(),
        torch.arange(size),
        shared_negative_ids=torch.from_numpy(ids),
        shared_log_probability=torch.from_numpy(log_probability),
    )
    count = size * length * world_size
    return StepBatches([batch], count, count, size * world_size)


def measure(options: argparse.Namespace) -> None:
    """One rank's part: train some steps, rank some users, and write what it took."""
    counted: Counter[str] = Counter()
    count_collectives(counted)
    ranks = start_ranks(1)
    config = validate(
        RunConfig,
        {
            "data": {"path": "none", "max_len": options.max_len},
            "mltfr": {"enabled": False},
            "loss": {"name": "sampled_softmax", "num_negatives": options.negatives},
            "optimizer": {"item_gradients": options.gradients},
            "training": {"global_batch_size": options.batch * ranks.world_size},
            "deepspeed": str(REPOSITORY / "ds_configs" / f"zero{options.stage}.json"),
        },
        source="the benchmark",
    )
    spec = ModelSpec(
        backbone=config.backbone,
        mltfr=config.mltfr,
        loss=config.loss,
        published=config.published,
        num_items=options.items,
        max_len=options.max_len,
        tables=(),
        has_consensus=False,
        sparse_items=options.gradients == "sparse",
    )
    model = spec.build({})
    engine = Engine(model, config, ranks, batch_layout(config, ranks), 1)
    times = []
    for step in range(options.steps + 2):
        batches = random_step(options, step, ranks.rank, ranks.world_size)
        if step == 2:  # warm
            counted.clear()
        ranks.barrier()
        started = time.perf_counter()
        engine.update(batches, step)
        ranks.barrier()
        times.append(time.perf_counter() - started)
    received = sum(counted.values()) / options.steps
    trained = peak_memory_bytes()
    engine.deepspeed.eval()
    batch = batches.micro_batches[0]
    users, none = options.users, torch.zeros(0, dtype=torch.int64)
    ranking = RankingBatch(batch.item_ids[:users], batch.target_ids[:users, -1], none, none)
    started = time.perf_counter()
    with torch.no_grad():
        ByModel(engine.module)(ranking, excluded(ranking, filter_seen=True))
    result = {
        "seconds": min(times[2:]),
        "peak": trained,
        "received": received,
        "ranking": time.perf_counter() - started,
    }
    result["ranking_peak"] = peak_memory_bytes() - trained
    Path(f"{options.output}.{ranks.rank}").write_text(json.dumps(result))
    stop_ranks()
    leave()


def run_case(
    options: argparse.Namespace, items: int, gradients: str, num_ranks: int
) -> dict[str, float] | str:
    """What a case took: the slowest rank's, memory and bytes of the rank that needs most; or why
    there is nothing.
    """
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "found"
        case = ["--items", str(items), "--gradients", gradients, "--output", str(output)]
        command = torchrun(num_ranks, Path(__file__).resolve(), *sys.argv[1:], *case)
        done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True)
        if done.returncode:
            return f"failed: {done.stderr.strip().splitlines()[-1]}"
        result: list[dict[str, float]] = [
            json.loads(path.read_text()) for path in Path(scratch).iterdir()
        ]
        return {key: max(one[key] for one in result) for key in result[0]}


def main() -> None:
    """Measure every case and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[10**5, 10**6, 10**7], help="rows of the item table"
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=32, help="sequences of a rank")
    parser.add_argument("--max-len", type=int, default=50)
    parser.add_argument("--negatives", type=int, default=256)
    parser.add_argument(
        "--users", type=int, default=4, help="users ranked among all items at a time"
    )
    parser.add_argument("--stage", type=int, default=1, help="ZeRO stage")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument(
        "--limit", type=float, default=12.0, help="GiB that all ranks together may need"
    )
    parser.add_argument("--items", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--gradients", help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.output:
        return measure(options)
    print(
        "| items | gradients | ranks | step, s | peak, GiB a rank | received a step, MB | ranking "
        "users, s | GiB more |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for gradients in ("dense", "sparse"):
        for num_ranks in options.ranks:
            known: list[tuple[int, dict[str, Any]]] = []
            for items in options.sizes:
                row = f"| {items:,} | {gradients} | {num_ranks} |"
                if len(known) > 1:
                    (few, low), (many, high) = known[-2:]
                    peak = high["peak"] + (high["peak"] - low["peak"]) / (many - few) * (
                        items - many
                    )
                    if peak * num_ranks > options.limit * GIB:
                        print(f"{row} not run | about {peak / GIB:.1f} | | | |", flush=True)
                        continue
                result = run_case(options, items, gradients, num_ranks)
                if isinstance(result, str):
                    print(f"{row} {result} | | | | |", flush=True)
                    continue
                known.append((items, result))
                print(
                    f"{row} {result['seconds']:.3f} | {result['peak'] / GIB:.2f} | "
                    f"{result['received'] / 1e6:.2f} | "
                    f"{result['ranking']:.2f} | {result['ranking_peak'] / GIB:.2f} |",
                    flush=True,
                )
    return None


if __name__ == "__main__":
    if sys.argv[1:2] == ["rows"]:
        from item_rows import main as main_of_rows

        main_of_rows()
    else:
        main()
