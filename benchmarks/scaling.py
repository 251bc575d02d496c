"""Sequences per second by number of ranks, at equal work per rank; and the bytes that cross ranks a
step, by collective.

One thread a rank; each number of ranks runs in processes of its own (torchrun), in turn, round by
round; medians count. Bytes are those that a rank receives, by what torch.distributed
is asked to do, beside the lower bound: an all-reduce of n bytes cannot be done with fewer than 2 n
(N - 1) / N to each rank. What ranks of one machine add in memory that they share is told by its own
size.

Unconnected ranks are the machine's own limit: as many single ranks at the same time, which know
nothing of each other and share only caches, memory and cores.

    python benchmarks/scaling.py --data data/ml-100k --tables data/tables
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import chain, count, islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support import REPOSITORY, clean_environment, torchrun

from mltfr_dist.config import RunConfig
from mltfr_dist.distributed.engine import Engine, batch_layout
from mltfr_dist.distributed.meeting import leave, start_ranks, stop_ranks
from mltfr_dist.distributed.shared_memory import SharedMemory
from mltfr_dist.schema import validate
from mltfr_dist.training.build import build_model
from mltfr_dist.training.inputs import load_inputs
from mltfr_dist.training.streams import train_stream

RECEIVED: dict[str, Callable[[int, int], float]] = {
    "all_reduce": lambda size, n: 2 * size * (n - 1) / n,
    "reduce_scatter_tensor": lambda size, n: size * (n - 1),
    "all_gather_into_tensor": lambda size, n: size * (n - 1) / n,
    "all_to_all_single": lambda size, n: size * (n - 1) / n,
    "broadcast": lambda size, n: size,
}
"""Bytes that a rank receives at least, by collective, of the size of its output and the number of
ranks.
"""


def count_collectives(counted: Counter[str], calls: Counter[str]) -> None:
    """Let torch.distributed, and the memory that ranks share, count what they are asked to do."""

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*given: Any, **named: Any) -> Any:
            output: torch.Tensor = [*given, *named.values()][0]
            calls[name] += 1
            counted[name] += round(
                RECEIVED[name](output.numel() * output.element_size(), dist.get_world_size())
            )
            return call(*given, **named)

        return wrapped

    for name in RECEIVED:
        setattr(dist, name, counting(name, getattr(dist, name)))
    added = SharedMemory.reduce

    def through_memory(
        shared: SharedMemory, tensors: list[torch.Tensor], *given: Any, **named: Any
    ) -> None:
        calls["sum through memory"] += 1
        counted["sum through memory"] += sum(t.nbytes for t in tensors)
        added(shared, tensors, *given, **named)

    SharedMemory.reduce = through_memory  # type: ignore[method-assign, assignment]


def arrived(output: str, ending: str) -> int:
    """How many groups have left a file of such a name beside this group's output."""
    return len(list(Path(output).parent.glob(f"*{ending}")))


def meet(output: str, ending: str, groups: int) -> None:
    """Wait until so many groups have come here, so that all of them are measured at once."""
    Path(output).with_suffix(ending).touch()
    while arrived(output, ending) < groups:
        time.sleep(0.001)


def measure(options: argparse.Namespace) -> None:
    """One rank's part: train some steps and write what they took."""
    counted, calls = Counter[str](), Counter[str]()
    count_collectives(counted, calls)
    ranks = start_ranks(1)
    if options.gloo:
        ranks = replace(ranks, shared=None)
    config = validate(
        RunConfig,
        {
            "data": {"path": str(options.data), "max_len": options.max_len, "last_batch": "drop"},
            "mltfr": {
                "enabled": options.tables is not None,
                "tables": sorted(str(p) for p in options.tables.iterdir())
                if options.tables
                else [],
            },
            "training": {"global_batch_size": options.batch * ranks.world_size},
            "deepspeed": str(REPOSITORY / "ds_configs" / f"zero{options.stage}.json"),
        },
        source="the benchmark",
    )
    model = build_model(config, load_inputs(config, verify=False), ranks, with_consensus=False)
    engine = Engine(model, config, ranks, batch_layout(config, ranks), 1)
    stream = train_stream(config, engine.layout)
    steps = enumerate(chain.from_iterable(map(stream.epoch, count())))
    for step, batches in islice(steps, 2):  # warm
        engine.update(batches, step)
    meet(options.output, ".warm", options.groups)
    ranks.barrier()
    counted.clear()
    calls.clear()
    started = time.perf_counter()
    for step, batches in islice(steps, options.steps):
        engine.update(batches, step)
    seconds = time.perf_counter() - started  # the last update has waited for all ranks
    if ranks.is_main:
        trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
        result = {
            "seconds": seconds / options.steps,
            "trained": trained,
            "bytes": {k: v / options.steps for k, v in counted.items()},
            "calls": {k: v / options.steps for k, v in calls.items()},
        }
        Path(options.output).write_text(json.dumps(result))
    if options.groups > 1:  # the others are measured beside work like theirs to their end
        for step, batches in steps:
            if arrived(options.output, ".json") == options.groups:
                break
            engine.update(batches, step)
    stop_ranks()
    leave()


def run_at_once(groups: list[int]) -> list[dict[str, Any]]:
    """Start a group of so many ranks for each entry, all at the same time; what each has found."""
    with tempfile.TemporaryDirectory() as scratch:
        running = []
        for number, num_ranks in enumerate(groups):
            output = Path(scratch) / f"{number}.json"
            told = ["--output", str(output), "--groups", str(len(groups))]
            command = torchrun(num_ranks, Path(__file__).resolve(), *sys.argv[1:], *told)
            pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
            running.append((output, subprocess.Popen(command, env=clean_environment(), **pipes)))  # type: ignore[call-overload]
        for _, process in running:
            said = process.communicate()[1]
            if process.returncode:
                sys.exit(said[-4000:])
        return [json.loads(output.read_text()) for output, _ in running]


def main() -> None:
    """Measure each number of ranks and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument(
        "--tables",
        type=Path,
        help="folder of token tables; without it the bare backbone is measured",
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=32, help="sequences of a rank")
    parser.add_argument("--max-len", type=int, default=100)
    parser.add_argument("--stage", type=int, default=1, help="ZeRO stage")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--gloo", action="store_true", help="as ranks of several machines, which share no memory"
    )
    parser.add_argument("--output", help=argparse.SUPPRESS)
    parser.add_argument("--groups", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.output:
        return measure(options)
    found: dict[int, list[dict[str, Any]]] = {n: [] for n in options.ranks}
    apart: dict[int, list[float]] = {n: [] for n in options.ranks}
    for _ in range(options.rounds):
        for num_ranks in options.ranks:
            found[num_ranks] += run_at_once([num_ranks])
            if num_ranks > 1:
                alone = run_at_once([1] * num_ranks)
                apart[num_ranks].append(sum(options.batch / one["seconds"] for one in alone))
    speeds = {n: [options.batch * n / one["seconds"] for one in found[n]] for n in options.ranks}
    base = median(speeds[options.ranks[0]])
    for num_ranks, (result, *_) in found.items():
        speed = median(speeds[num_ranks])
        shares = sorted(a / b for a, b in zip(speeds[num_ranks], apart[num_ranks], strict=False))
        print(f"{num_ranks} rank(s): {speed:8.1f} sequences/s, {speed / base:.2f} times the first")
        if shares:
            each = ", ".join(f"{share:.3f}" for share in shares)
            print(f"    {median(shares):.3f} of unconnected ranks (by round {each})")
        bound = 2 * result["trained"] * (num_ranks - 1) / num_ranks
        sent = ", ".join(
            f"{result['calls'][name]:.0f} {name} {size / 1e6:.3f} MB"
            for name, size in sorted(result["bytes"].items())
            if size >= 1
        )
        print(f"    a step: {sent or 'nothing'}; gradients need {bound / 1e6:.3f} MB")
    return None


if __name__ == "__main__":
    main()
