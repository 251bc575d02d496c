"""What this does on one CUDA GPU: first whether its numbers are the CPU's, then what it costs.

    python benchmarks/gpu.py                        # the tests marked `gpu`, then all measurements
    python benchmarks/gpu.py --skip-tests --only bare --output gpu.json

Nothing is fetched and nothing else is needed: interactions and token tables are random, of real
sizes. `Beauty` is the Amazon set's (22,363 users, 12,101 items, 198,502 interactions); `million`
has a million items; the six tables are as long and wide as those of the paper. Each case trains an
epoch (at most ``--max-steps`` steps of it: the epoch's time is then computed) after a warm-up, and
ranks all items for the users of its validation split.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import numpy as np
import torch
from support import REPOSITORY, write_table

from mltfr_dist.config import PrepareConfig, RunConfig
from mltfr_dist.data.prepare.run import prepare
from mltfr_dist.data.stream.training import StepBatches
from mltfr_dist.distributed.engine import Engine, batch_layout
from mltfr_dist.distributed.meeting import start_ranks, stop_ranks
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.distributed.resources import MatrixWork, matrix_peak
from mltfr_dist.models.replay import SWITCH
from mltfr_dist.schema import changed, validate
from mltfr_dist.training.build import build_model
from mltfr_dist.training.evaluating.evaluate import evaluate
from mltfr_dist.training.evaluating.rankers import ByModel
from mltfr_dist.training.inputs import load_inputs
from mltfr_dist.training.running.step_values import step_totals
from mltfr_dist.training.seeds import seed_all
from mltfr_dist.training.streams import ranking_stream, train_stream

TABLES = {
    "llama": (32_000, 4096),
    "bert": (30_522, 768),
    "p5_beauty": (32_100, 768),
    "p5_toys": (32_100, 768),
    "gpt2": (50_257, 768),
    "qwen3": (151_936, 1024),
}
"""Rows and columns of the paper's six tables."""

WARM_UP = 40
"""Steps before any is timed: kernels are loaded and chosen for each length of a batch."""

PACKAGE = "/mltfr_dist/"


@dataclass
class Case:
    """What is measured."""

    name: str
    data: str
    with_tables: bool = False
    changes: dict[str, Any] = field(default_factory=dict)
    max_steps: int = 1 << 30
    recorded: bool = False
    """Whether passes are recorded and played (models/replay.py)."""


BF16 = {"training.precision": "bf16"}
SPARSE = {
    "loss.name": "sampled_softmax",
    "loss.num_negatives": 1024,
    "optimizer.item_gradients": "sparse",
}
EXACT = {"mltfr.filter.shortlist_size": None}
CASES = (
    Case("bare", "beauty"),
    Case("bare, recorded", "beauty", recorded=True),
    Case("bare bf16", "beauty", changes=BF16),
    Case("MLTFR, shortlist", "beauty", with_tables=True),
    Case("MLTFR, shortlist, recorded", "beauty", with_tables=True, recorded=True),
    Case("MLTFR, shortlist, bf16", "beauty", with_tables=True, changes=BF16),
    Case("MLTFR, exact", "beauty", with_tables=True, changes=EXACT, max_steps=30),
    Case("million, full softmax", "million", max_steps=30),
    Case("million, full softmax, bf16", "million", changes=BF16, max_steps=30),
    Case("million, sampled, sparse", "million", changes=SPARSE, max_steps=100),
)


def write_interactions(folder: Path, *, users: int, items: int, per_user: float) -> Path:
    """Prepared data of that size: popularity falls as in real sets, and every item is there."""
    rng = np.random.default_rng(0)
    lengths = 5 + rng.geometric(1 / max(1.0, per_user - 4), users) - 1
    popular = (items * rng.random(int(lengths.sum())) ** 2).astype(np.int64)
    seen = rng.permutation(len(popular))[:items]
    popular[seen] = rng.permutation(items)[: len(seen)]
    ends = np.cumsum(lengths)
    source = folder / "interactions.txt"
    source.parent.mkdir(parents=True, exist_ok=True)
    with source.open("w") as lines:
        for user, (start, end) in enumerate(zip(ends - lengths, ends)):
            lines.write(f"u{user} " + " ".join(map("i{}".format, popular[start:end])) + "\n")
    config = PrepareConfig(format="sequences", user_core=1, item_core=1)
    prepare(str(source), folder / "data", config, log=lambda _: None)
    return folder / "data"


class Inputs:
    """Data and tables, made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._made = folder, dict[str, Any]()

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            started = time.monotonic()
            self._made[name] = make()
            print(f"  {name} made in {time.monotonic() - started:.0f} s", flush=True)
        return self._made[name]

    def data(self, name: str) -> Path:
        """The prepared folder of that name."""
        sizes: dict[str, dict[str, Any]] = {
            "beauty": {"users": 22_363, "items": 12_101, "per_user": 8.9},
            "million": {"users": 150_000, "items": 1_000_000, "per_user": 12.0},
        }
        return self._once(name, lambda: write_interactions(self.folder / name, **sizes[name]))  # type: ignore[no-any-return]

    def tables(self) -> list[str]:
        """The six token tables."""

        def make() -> list[str]:
            return [
                str(write_table(self.folder / "tables", name, num_rows=v, dim=d, seed=seed))
                for seed, (name, (v, d)) in enumerate(TABLES.items())
            ]

        return self._once("tables", make)  # type: ignore[no-any-return]


def config_for(case: Case, inputs: Inputs) -> RunConfig:
    """The run of a case: SASRec of two layers, d = 64, at most 50 items, 256 sequences a step."""
    values: dict[str, Any] = {
        "data": {"path": str(inputs.data(case.data)), "max_len": 50},
        "backbone": {"hidden_dim": 64, "num_heads": 2, "dropout": 0.2},
        "mltfr": {
            "enabled": case.with_tables,
            "tables": inputs.tables() if case.with_tables else [],
        },
        "training": {"global_batch_size": 256},
    }
    base = validate(RunConfig, values, source="the benchmark")
    return changed(base, case.changes, source="the benchmark")


def train_step(engine: Engine, batches: StepBatches, step: int) -> None:
    """A whole step as a run makes it, but for what it logs."""
    seed_all(0, 0, step, engine.ranks.rank)
    engine.module.before_update(step, batches.micro_batches, engine.ranks)
    totals = step_totals(engine.update(batches, step, forms_norm=False), batches)
    engine.stopwatch.take()
    engine.module.after_update(None if totals.routing is None else totals.routing.gate)


def timed(steps: Iterator[StepBatches], engine: Engine, first: int) -> tuple[float, int, int, int]:
    """Seconds, steps, sequences and positions of updates, data included."""
    torch.cuda.synchronize()
    started, taken, sequences, positions = time.perf_counter(), 0, 0, 0
    for step, batches in enumerate(steps, first):
        train_step(engine, batches, step)
        taken += 1
        sequences += batches.num_sequences
        positions += batches.num_positions
    torch.cuda.synchronize()
    return time.perf_counter() - started, taken, sequences, positions


def waits(engine: Engine, batches: StepBatches) -> dict[str, int]:
    """Where one update waits for the GPU: line of this package to number of times."""
    torch.cuda.synchronize()
    result: collections.Counter[str] = collections.Counter()

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message):
            lines = [f for f in traceback.extract_stack() if PACKAGE in f.filename]
            where = lines[-1] if lines else None
            place = f"{where.filename.partition(PACKAGE)[2]}:{where.lineno}" if where else "torch"
            result[place] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        train_step(engine, batches, 1)
        torch.cuda.set_sync_debug_mode("default")
    return dict(result.most_common())


def measure(case: Case, inputs: Inputs, ranks: Ranks, max_steps: int) -> dict[str, Any]:
    """One case: what an epoch, a step and a validation take."""
    config = config_for(case, inputs)
    os.environ[SWITCH] = "on" if case.recorded else "off"
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    layout = batch_layout(config, ranks)
    model = build_model(config, load_inputs(config, verify=False), ranks, with_consensus=False)
    engine = Engine(model.to(ranks.device), config, ranks, layout, 1)
    stream = train_stream(config, layout)
    engine.deepspeed.train()
    timed(islice(stream.epoch(0), WARM_UP), engine, 0)
    wanted = min(stream.steps_per_epoch, case.max_steps, max_steps)
    seconds, steps, sequences, positions = timed(islice(stream.epoch(1), wanted), engine, WARM_UP)
    peak_memory = torch.cuda.max_memory_allocated()
    batches = stream.step(2, 0)
    where = waits(engine, batches)
    with MatrixWork() as work:
        train_step(engine, batches, 1)
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    flops = work.flops / batches.num_positions * positions / seconds
    engine.deepspeed.eval()
    users = ranking_stream(config, "valid", ranks)
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    num_batches = 40
    evaluate(ByModel(engine.module), islice(users, num_batches), config.evaluation, ranks)
    torch.cuda.synchronize()
    ranked = min(users.num_users, num_batches * config.evaluation.batch_size)
    result = {
        "case": case.name,
        "step_ms": 1e3 * seconds / steps,
        "epoch_s": seconds / steps * stream.steps_per_epoch,
        "sequences_per_s": sequences / seconds,
        "positions_per_s": positions / seconds,
        "peak_gib": peak_memory / 2**30,
        "share_of_peak": flops / matrix_peak(ranks.device, dtype),
        "users_ranked_per_s": ranked / (time.perf_counter() - started),
        "ranking_peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "waits": sum(where.values()),
        "waits_at": where,
    }
    engine.destroy()
    return result


COLUMNS = {
    "step_ms": ("step", "{:.1f} ms"),
    "epoch_s": ("epoch", "{:.1f} s"),
    "positions_per_s": ("positions/s", "{:,.0f}"),
    "peak_gib": ("memory", "{:.2f} GiB"),
    "share_of_peak": ("of peak", "{:.1%}"),
    "users_ranked_per_s": ("users ranked/s", "{:,.0f}"),
    "ranking_peak_gib": ("memory", "{:.2f} GiB"),
    "waits": ("waits/step", "{}"),
}


def row(result: dict[str, Any]) -> str:
    """A line of the table."""
    cells = [shape.format(result[key]) for key, (_, shape) in COLUMNS.items()]
    return f"| {result['case']} | " + " | ".join(cells) + " |"


def main() -> int:
    """Test, measure, print; exit code 1 where a test fails or a case cannot be measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--only", help="cases whose name holds this")
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--output", type=Path, default=Path("gpu.json"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no CUDA GPU that torch sees; nothing was measured.")
        return 1
    code = 0
    if not options.skip_tests:
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/gpu", "-rA", "-q"]
        code = subprocess.run(command, cwd=REPOSITORY).returncode
    ranks = start_ranks()
    properties = torch.cuda.get_device_properties(ranks.device)
    about = {
        "card": properties.name,
        "memory_gib": properties.total_memory / 2**30,
        "torch": torch.__version__,
        "fp32_peak": matrix_peak(ranks.device, torch.float32),
        "bf16_peak": matrix_peak(ranks.device, torch.bfloat16),
    }
    print(json.dumps(about))
    results: list[dict[str, Any]] = []
    print("| case | " + " | ".join(name for name, _ in COLUMNS.values()) + " |", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        inputs = Inputs(Path(temporary))
        for case in CASES:
            if options.only and options.only not in case.name:
                continue
            try:
                results.append(measure(case, inputs, ranks, options.max_steps))
                print(row(results[-1]), flush=True)
            except Exception:
                code = 1
                results.append({**asdict(case), "case": case.name, "error": traceback.format_exc()})
                print(f"| {case.name} | failed: {traceback.format_exc()}", flush=True)
            options.output.write_text(json.dumps({"machine": about, "cases": results}, indent=2))
    stop_ranks()
    return code


if __name__ == "__main__":
    raise SystemExit(main())
