"""What a placement of token tables costs: bytes held, peak and private memory, step time, bytes
exchanged a step.

peak: resident memory at most, training included; PSS after the last step, shared pages counted by
share; private: what the tables (and the small model) brought once loaded and no other process can
share.

Two fp32 tables; each placement at each number of ranks runs in processes of its own (torchrun), one
thread each. The machine may be shared and noisy: read step times as ratios to `replicated` at the
same number of ranks.

    # 32000 x 2048, 1, 2 and 4 ranks
    python benchmarks/table_memory.py
    python benchmarks/table_memory.py --rows 8000 --ranks 2 --placements rows replicated
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support import REPOSITORY, clean_environment, tiny_config, torchrun, write_data, write_table

from mltfr_dist.config import RunConfig
from mltfr_dist.distributed.engine import Engine, batch_layout
from mltfr_dist.distributed.meeting import leave, start_ranks, stop_ranks
from mltfr_dist.distributed.table_shards import Exchange, RowSharded
from mltfr_dist.models.mltfr import MLTFR
from mltfr_dist.training.build import build_model
from mltfr_dist.training.inputs import load_inputs
from mltfr_dist.training.streams import train_stream

PLACEMENTS = ("replicated", "rows", "mmap", "zero3")
MIB = 1 << 20


def config_for(folder: Path, options: argparse.Namespace, placement: str) -> RunConfig:
    """The same run with its tables placed in one way."""
    stage = 3 if placement == "zero3" else 1
    return tiny_config(
        folder,
        data__max_len=50,
        backbone__hidden_dim=64,
        mltfr__placement=placement,
        mltfr__tables=[str(folder / "tables" / name) for name in ("left", "right")],
        mltfr__filter={"top_k": 16, "query_every": 4, "shortlist_size": options.shortlist or None},
        training__global_batch_size=options.batch * max(options.ranks),
        deepspeed=str(REPOSITORY / "ds_configs" / f"zero{stage}.json"),
    )


def memory() -> dict[str, float]:
    """This process's memory in MiB, by the kernel's names; Hwm is the peak of resident memory."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    result = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines}
    status = Path("/proc/self/status").read_text().splitlines()
    return result | {
        "Hwm": next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmHWM:"))
    }


def forget_peak() -> None:
    """Count the peak from here on."""
    Path("/proc/self/clear_refs").write_text("5")


def held(mltfr: MLTFR) -> float:
    """MiB of tables in this process's memory: whole, its rows, its ZeRO-3 part; none where they are
    mapped.
    """
    rows = [getattr(t.rows, "ds_tensor", t.rows) for t in mltfr.tables if not hasattr(t, "like")]
    return sum(r.numel() * r.element_size() for r in rows) / MIB


def measure(folder: Path, options: argparse.Namespace) -> None:
    """One rank's part: train some steps and write what they took."""
    ranks = start_ranks(1)
    config = config_for(folder, options, options.placement)
    layout = batch_layout(config, ranks)
    inputs = load_inputs(config, verify=False)
    forget_peak()
    before = memory()
    model = build_model(config, inputs, ranks, with_consensus=False)
    loaded = memory()
    engine = Engine(model, config, ranks, layout, 1)
    mltfr = engine.module.mltfr
    assert mltfr is not None
    exchange = next(
        (t.exchange for t in mltfr.tables if isinstance(t, RowSharded)), Exchange(ranks)
    )
    times, stream = [], train_stream(config, layout)
    for step, batches in enumerate(stream.epoch(0)):
        if step == 0:
            engine.module.before_update(0, batches.micro_batches, ranks)
        if step == 1:
            exchange.received.clear()  # the first step builds what later ones use
        ranks.barrier()
        started = time.perf_counter()
        engine.update(batches, step)
        times.append(time.perf_counter() - started)
        if step == options.steps:
            break
    after = memory()
    grown = (
        after["Hwm"] - before["Rss"],
        after["Pss"] - before["Pss"],
        private(loaded) - private(before),
    )
    worst = ranks.max(torch.tensor(grown))
    if ranks.is_main:
        result = {
            "held": held(mltfr),
            "peak": float(worst[0]),
            "pss": float(worst[1]),
            "private": float(worst[2]),
            "step": min(times[1:]),  # others may be using the machine
            "received": {
                name: count / (len(times) - 1) / MIB for name, count in exchange.received.items()
            },
        }
        Path(options.output).write_text(json.dumps(result))
    stop_ranks()
    leave()


def private(result: dict[str, float]) -> float:
    """Memory that no other process could share: written to, or anonymous. Mapped pages that are
    only read are not.
    """
    return result["Private_Dirty"]


def main() -> None:
    """Measure each placement and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=32000)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument(
        "--batch", type=int, default=8, help="sequences of a rank at the largest number of ranks"
    )
    parser.add_argument(
        "--shortlist",
        type=int,
        default=0,
        help="rows searched per table; 0: the whole table, in every step",
    )
    parser.add_argument("--steps", type=int, default=4, help="timed steps")
    parser.add_argument("--placements", nargs="+", default=list(PLACEMENTS), choices=PLACEMENTS)
    parser.add_argument("--placement", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.placement:
        return measure(options.folder, options)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_data(folder, num_users=400, longest=50)
        for seed, name in enumerate(("left", "right")):
            write_table(folder / "tables", name, num_rows=options.rows, dim=options.dim, seed=seed)
        whole = 2 * options.rows * options.dim * 4 / MIB
        print(
            f"two tables {options.rows} x {options.dim} fp32, {whole:.0f} MiB; MiB added to the "
            f"rank that needs most"
        )
        columns = (
            "ranks",
            "placement",
            "held",
            "of whole",
            "peak",
            "PSS",
            "private",
            "step",
            "of replicated",
            "received a step",
        )
        print("  ".join(f"{c:>12}" for c in columns))
        for num_ranks in options.ranks:
            reference = None
            for placement in options.placements:
                output = folder / "found.json"
                given = [
                    *sys.argv[1:],
                    "--placement",
                    placement,
                    "--folder",
                    str(folder),
                    "--output",
                    str(output),
                ]
                command = torchrun(num_ranks, Path(__file__), *given)
                done = subprocess.run(
                    command, env=clean_environment(), capture_output=True, text=True
                )
                if done.returncode:
                    sys.exit(done.stderr[-4000:])
                result = json.loads(output.read_text())
                reference = result["step"] if placement == "replicated" else reference
                ratio = f"{result['step'] / reference:.2f}x" if reference else "-"
                received = (
                    ", ".join(f"{name} {size:.2f}" for name, size in result["received"].items())
                    or "-"
                )
                cells = [
                    num_ranks,
                    placement,
                    f"{result['held']:.1f}",
                    f"{result['held'] / whole:.1%}",
                    f"{result['peak']:.0f}",
                ]
                cells += [
                    f"{result['pss']:.0f}",
                    f"{result['private']:.0f}",
                    f"{result['step']:.2f} s",
                    ratio,
                    received,
                ]
                print("  ".join(f"{c:>12}" for c in cells), flush=True)
    return None


if __name__ == "__main__":
    main()
