"""An item table divided by rows: memory of a rank, steps, bytes, a save, a kill, and what goes on
at other numbers of ranks.

    python benchmarks/item_tables.py rows                       # 3 x 10^6 items
    python benchmarks/item_tables.py rows --items 30000000      # needs 16 GB

A bare SASRec under sampled softmax and lazy Adam. Two ranks train on the table and on one of 10^5
items, save, and kill themselves in the midst of the next step; others go on from what they saved
and rank some users. Every number of ranks also trains alone, for the memory of a share. The bytes
that rows bring are held against `division_costs.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from division_costs import Case
from item_tables import GIB, random_step
from support import REPOSITORY, clean_environment, torchrun

from mltfr_dist.config import RunConfig
from mltfr_dist.data.batch import RankingBatch
from mltfr_dist.data.stream.training import StepBatches
from mltfr_dist.distributed.checkpoint import Progress
from mltfr_dist.distributed.divided_optimizer import DividedOptimizer
from mltfr_dist.distributed.engine import Engine, batch_layout
from mltfr_dist.distributed.item_placement import division_of_items
from mltfr_dist.distributed.meeting import leave, start_ranks, stop_ranks
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.distributed.resources import peak_memory_bytes
from mltfr_dist.distributed.saver import Saver
from mltfr_dist.distributed.saving import read_weights, restore_optimizer, save
from mltfr_dist.models.divided_rows import DividedRows, divided_rows
from mltfr_dist.schema import validate
from mltfr_dist.spec import ModelSpec
from mltfr_dist.training.evaluating.evaluate import evaluate
from mltfr_dist.training.evaluating.rankers import ByModel

Found = dict[str, float]


def run_config(options: argparse.Namespace, ranks: Ranks) -> RunConfig:
    """A bare SASRec whose table is divided."""
    return validate(
        RunConfig,
        {
            "data": {"path": "none", "max_len": options.max_len},
            "backbone": {"hidden_dim": options.dim},
            "mltfr": {"enabled": False},
            "item_table": {"placement": "rows"},
            "loss": {"name": "sampled_softmax", "num_negatives": options.negatives},
            "optimizer": {"item_gradients": "sparse"},
            "training": {"global_batch_size": options.batch * ranks.world_size},
            "deepspeed": str(REPOSITORY / "ds_configs" / "zero1.json"),
        },
        source="the benchmark",
    )


def made_engine(options: argparse.Namespace, ranks: Ranks, place: Path | None) -> Engine:
    """An engine, from the checkpoint ``place`` where there is one."""
    config = run_config(options, ranks)
    torch.manual_seed(0)
    spec = ModelSpec(
        backbone=config.backbone,
        mltfr=config.mltfr,
        loss=config.loss,
        published=config.published,
        num_items=options.items,
        max_len=options.max_len,
        tables=(),
        has_consensus=False,
        sparse_items=True,
    )
    model = spec.build({}, divide=division_of_items(config, ranks))
    if place is not None:
        model.load_state_dict(read_weights(model, place, ranks))
    engine = Engine(model, config, ranks, batch_layout(config, ranks), 1)
    if place is not None:
        restore_optimizer(place, engine)
    return engine


def trained(engine: Engine, options: argparse.Namespace) -> Found:
    """Seconds of the fastest of some steps, and what the last brought of rows, as counted and as
    the formula says.
    """
    times, ranks = [], engine.ranks
    rows, optimizer = divided_rows(engine.module), engine.row_adam
    received = (
        optimizer.division.exchange.received if isinstance(optimizer, DividedOptimizer) else {}
    )
    for step in range(options.steps + 2):
        batches = random_step(options, step, ranks.rank, ranks.world_size)
        if received:
            received.clear()
        ranks.barrier()
        started = time.perf_counter()
        engine.update(batches, step)
        ranks.barrier()
        times.append(time.perf_counter() - started)
    result = {"step": min(times[2:]), "received": float(sum(received.values()))}
    if rows is not None:
        case = Case(options.items, options.dim, ranks.world_size, read(rows, batches), 0)
        result["expected"] = sum(case.received().values())
    return result


def read(rows: DividedRows, batches: StepBatches) -> int:
    """Distinct rows that this rank's batch reads."""
    (batch,) = batches.micro_batches
    ids = [batch.item_ids, batch.target_ids, *(t for t in batch.sampled if t is not None)]
    return len(torch.unique(rows.division.positions(torch.cat([t.flatten() for t in ids]))))


def held(engine: Engine) -> float:
    """Bytes of this rank's rows and moments."""
    optimizer = engine.row_adam
    assert optimizer is not None
    tensors = [optimizer.rows.weight, *optimizer.moments.values()]
    return float(sum(t.numel() * t.element_size() for t in tensors))


def fresh_peak() -> None:
    """Forget this process's peak of memory."""
    Path("/proc/self/clear_refs").write_text("5")


def ranked(engine: Engine, options: argparse.Namespace) -> float:
    """Seconds that ranking some users takes; each rank has its part of them."""
    ranks, none = engine.ranks, torch.zeros(0, dtype=torch.int64)
    of_rank = options.users // ranks.world_size
    batches = []
    for start in range(0, of_rank, options.users_at_once):
        (batch,) = random_step(options, start, ranks.rank, ranks.world_size).micro_batches
        size = min(options.users_at_once, of_rank - start)
        history = batch.item_ids[:size]
        batches.append(RankingBatch(history, batch.target_ids[:size, -1], none, none))
    engine.deepspeed.eval()
    started = time.perf_counter()
    evaluate(ByModel(engine.module), batches, engine.config.evaluation, ranks)
    return time.perf_counter() - started


def saved_meanwhile(engine: Engine, options: argparse.Namespace, place: Path) -> Found:
    """Seconds that a save in the background holds training up at its begin and its end and that it
    takes, the median step meanwhile, and the memory that it adds.
    """
    ranks, step, times = engine.ranks, options.steps + 3, []
    fresh_peak()
    before, started = peak_memory_bytes(), time.perf_counter()
    with Saver(engine, background=True) as saver:
        saver.save(place.with_name("meanwhile"), Progress(stage="train", step=step))
        begun_in = time.perf_counter() - started
        while not times or engine.verdict.writes:
            batches = random_step(options, step, ranks.rank, ranks.world_size)
            ranks.barrier()
            begun = time.perf_counter()
            engine.update(batches, step)
            times.append(time.perf_counter() - begun)
        ended = time.perf_counter()
        saver.finish()
    return {
        "meanwhile_begin": begun_in,
        "meanwhile_end": time.perf_counter() - ended,
        "meanwhile": time.perf_counter() - started,
        "meanwhile_step": statistics.median(times),
        "meanwhile_more": float(peak_memory_bytes() - before),
    }


def measure(options: argparse.Namespace) -> None:
    """One rank's part."""
    ranks, place = start_ranks(1), Path(options.place)
    started = time.perf_counter()
    engine = made_engine(options, ranks, place if options.phase == "go on" else None)
    result = {"load": time.perf_counter() - started, "built": float(peak_memory_bytes())}
    fresh_peak()
    result |= trained(engine, options) | {"held": held(engine)}
    if options.phase == "go on":
        result["ranking"] = ranked(engine, options)
    result["peak"] = float(peak_memory_bytes())
    if options.phase == "save":
        before = peak_memory_bytes()
        started = time.perf_counter()
        save(place, engine, Progress(stage="train", step=options.steps + 2))
        result["save"] = time.perf_counter() - started
        result["save_more"] = float(peak_memory_bytes() - before)
        if options.background:
            result |= saved_meanwhile(engine, options, place)
    Path(f"{options.output}.{ranks.rank}").write_text(json.dumps(result))
    if options.phase == "save":
        ranks.barrier()
        threading.Timer(result["step"] / 2, os.kill, (os.getpid(), signal.SIGKILL)).start()
        while True:
            engine.update(random_step(options, 0, ranks.rank, ranks.world_size), 0)
    stop_ranks()
    leave()


def run_case(num_ranks: int, items: int, phase: str, place: Path) -> Found:
    """What a case took, of the rank that needs most; of bytes that rows brought, the mean of all
    ranks.

    Raises:
        RuntimeError: The ranks failed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "found"
        case = ["--phase", phase, "--place", str(place), "--output", str(output)]
        command = torchrun(
            num_ranks,
            Path(__file__).resolve().parent / "item_tables.py",
            *sys.argv[1:],
            *case,
            "--items",
            str(items),
        )
        done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True)
        result = [json.loads(path.read_text()) for path in Path(scratch).iterdir()]
        if len(result) < num_ranks or (done.returncode == 0) == (phase == "save"):
            raise RuntimeError(done.stderr[-4000:])
        worst = {key: max(one[key] for one in result) for key in result[0]}
        for key in {"received", "expected"} & worst.keys():
            worst[key] = sum(one[key] for one in result) / num_ranks
        return worst


def line(name: str, num_ranks: int, items: int, result: Found) -> str:
    """A line of the table."""
    share = (
        f"{result['received'] / 1e6:.3f} | {result['expected'] / 1e6:.3f}"
        if "expected" in result
        else "- | -"
    )
    return (
        f"| {name} | {num_ranks} | {items:,} | {result['held'] / 1e6:.1f} | "
        f"{result['built'] / GIB:.2f} "
        f"| {result['peak'] / GIB:.2f} | {result['step']:.3f} | {share} |"
    )


def told_of_background(saved: Found) -> str:
    """A save in the background, in words."""
    return (
        f"in the background {saved['meanwhile']:.1f} s, of which it holds training up "
        f"{saved['meanwhile_begin']:.2f} s at its begin and {saved['meanwhile_end']:.2f} s at its "
        f"end; a step takes {saved['meanwhile_step']:.3f} s "
        f"meanwhile; {saved['meanwhile_more'] / saved['held']:.1%} of a share more memory"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", choices=["rows"])
    parser.add_argument("--items", type=int, default=3 * 10**6)
    parser.add_argument("--few", type=int, default=10**5, help="items of the table to compare with")
    parser.add_argument("--dim", type=int, default=32)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--batch", type=int, default=32, help="sequences of a rank")
    parser.add_argument("--max-len", type=int, default=50)
    parser.add_argument("--negatives", type=int, default=256)
    parser.add_argument("--users", type=int, default=1000, help="ranked among all items")
    parser.add_argument("--users-at-once", type=int, default=125, help="of a rank")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument(
        "--background", action="store_true", help="save in the background too, from a second copy"
    )
    for hidden in ("--phase", "--place", "--output"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.output:
        return measure(options)
    print(
        "| | ranks | items | rows and moments, MB a rank | peak of building, GiB | peak, GiB | "
        "step, s | received, MB | formula |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "saved"
        few = run_case(2, options.few, "train", place)
        print(line("train", 2, options.few, few), flush=True)
        for num_ranks in options.ranks:
            if num_ranks != 2:
                result = run_case(num_ranks, options.items, "train", place)
                print(line("train", num_ranks, options.items, result), flush=True)
        saved = run_case(2, options.items, "save", place)
        print(line("train, save, killed", 2, options.items, saved), flush=True)
        gone_on = {n: run_case(n, options.items, "go on", place) for n in options.ranks if n != 2}
        for num_ranks, result in gone_on.items():
            print(line("go on, rank users", num_ranks, options.items, result), flush=True)
    print(f"\na step takes {saved['step'] / few['step']:.2f} times one of {options.few:,} items")
    share = saved["save_more"] / saved["held"]
    print(f"the save takes {saved['save']:.1f} s and {share:.1%} of a share more memory")
    if options.background:
        print(told_of_background(saved))
    for num_ranks, result in gone_on.items():
        print(
            f"{num_ranks} rank(s): load {result['load']:.1f} s, {options.users} users ranked in "
            f"{result['ranking']:.1f} s"
        )
    return None
