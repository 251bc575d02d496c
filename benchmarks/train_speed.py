"""What a training step costs: bare, with MLTFR (shortlist, exact, as published), beside its bare
matrix products.

The machine may be shared and noisy: read the ratios, not the seconds. Contestants take turns of a
few steps over the same batches, and the fastest time of each step counts. A step is an update, a
shortlist's refresh (every `mltfr.filter.shortlist_refresh_steps`) shared out over its steps. The
matrix products are the three of the loss over all items, chunk by chunk: less work no full softmax
can do.

With --peers, other libraries train the same SASRec on the same sequences by their own code, in
environments of their own that the first call makes. After each round each has a turn over
--peer-share of its epoch's batches, for a whole one takes minutes; its fastest turn counts. A
sample of RecBole is a prefix with one target, one of RecTools a sequence; seconds an epoch and
positions a second can be compared.

    python benchmarks/train_speed.py --data data/ml-100k --tables data/tables
    # bare backbone only
    python benchmarks/train_speed.py --data data/beauty --batch 256 --max-len 50 --peers
    python benchmarks/train_speed.py --data data/ml-100k --tables data/tables --profile shortlist
    # seconds until validation NDCG@10 is 0.035, of ours
    python benchmarks/train_speed.py --data data/beauty --batch 256 --max-len 50 --until 0.035
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peers import INSTALL, Peer, Process
from quality import bare, paper_frozen_tables, vary
from torch import Tensor

from mltfr_dist.config import RunConfig
from mltfr_dist.data.stream.training import StepBatches
from mltfr_dist.distributed.engine import Engine, batch_layout
from mltfr_dist.distributed.meeting import start_ranks, stop_ranks
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.distributed.resources import peak_memory_bytes
from mltfr_dist.models.cross_entropy import chunk_shape
from mltfr_dist.schema import validate
from mltfr_dist.training.build import build_model
from mltfr_dist.training.evaluating.compare import ranked
from mltfr_dist.training.evaluating.evaluate import evaluate
from mltfr_dist.training.evaluating.rankers import ByModel
from mltfr_dist.training.inputs import load_inputs
from mltfr_dist.training.running.step_values import step_totals
from mltfr_dist.training.seeds import seed_all
from mltfr_dist.training.streams import train_stream

VARIANTS: dict[str, Callable[[RunConfig], RunConfig]] = {
    "bare": bare,
    "shortlist": lambda base: base,
    "exact": lambda base: vary(base, {"mltfr.filter.shortlist_size": None}),
    "published": paper_frozen_tables,
}
PRODUCTS = "products"
TURN = 4
"""Steps that one contestant makes before the next has its turn."""
SQUARE = 2048
"""Rows and columns of the matrices that the machine's speed is measured with."""


@dataclass
class Cost:
    """Of one contestant."""

    name: str
    step_ms: float
    refresh_ms: float
    """Of one refresh of the shortlists; zero where there are none."""
    epoch_s: float
    sequences_s: float
    positions_s: float
    """Scored positions a second."""
    of_bare: float
    of_products: float
    peak_gib: float
    """Resident memory at most while it was built and first stepped, all built before it
    included.
    """


CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}
clock = CLOCKS["wall"]
"""Which seconds are counted; this process's processor time where other work shares the cores."""


def synchronized() -> float:
    """The clock, once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock()


def timed(work: Callable[[], object]) -> float:
    """Seconds of ``work``."""
    started = synchronized()
    work()
    return synchronized() - started


class LossProducts:
    """The three products of the loss over all items, and nothing else."""

    def __init__(self, num_items: int, dim: int, ranks: Ranks) -> None:
        self.rows, _ = chunk_shape(num_items, ranks.device.type)
        self.vectors = torch.randn(num_items, dim, device=ranks.device)
        self.gradient = torch.zeros_like(self.vectors)
        self.logits = self.vectors.new_empty(self.rows * num_items)

    def step(self, batches: StepBatches) -> None:
        """As many positions as ``batches`` score on this rank."""
        count = sum(batch.num_targets for batch in batches.micro_batches)
        hidden = torch.randn(count, self.vectors.shape[1], device=self.vectors.device)
        for h in torch.split(hidden, self.rows):
            logits = self.logits[: len(h) * len(self.vectors)].view(len(h), -1)
            torch.mm(h, self.vectors.T, out=logits)
            logits @ self.vectors
            self.gradient.addmm_(logits.T, h)

    def flops(self, batches: StepBatches) -> float:
        """Floating-point operations of :meth:`step`."""
        return 6.0 * sum(b.num_targets for b in batches.micro_batches) * self.vectors.numel()


def matrix_speed(ranks: Ranks) -> float:
    """Floating-point operations a second of a large fp32 product, at best."""
    left = torch.randn(SQUARE, SQUARE, device=ranks.device)
    out: Tensor = torch.empty_like(left)
    return 2.0 * SQUARE**3 / min(timed(lambda: torch.mm(left, left, out=out)) for _ in range(8))


def base_config(options: argparse.Namespace) -> RunConfig:
    """What the variants change."""
    tables = sorted(str(p) for p in options.tables.iterdir()) if options.tables else []
    fields = {
        "data": {"path": str(options.data), "max_len": options.max_len},
        "mltfr": {
            "enabled": bool(tables),
            "tables": tables,
            "filter": {"shortlist_size": options.shortlist},
        },
        "training": {"global_batch_size": options.batch},
    }
    return validate(RunConfig, fields, source="the benchmark")


class Contest:
    """Engines over the same batches."""

    def __init__(self, options: argparse.Namespace, ranks: Ranks) -> None:
        base = base_config(options)
        self.ranks, self.engines, self.peaks = ranks, {}, {}
        names = options.variants if options.tables else ["bare"]
        self.configs = {name: VARIANTS[name](base) for name in names}
        stream = train_stream(base, batch_layout(base, ranks))
        self.batches = list(islice(stream.epoch(0), options.steps))
        self.steps_per_epoch = stream.steps_per_epoch
        for name, config in self.configs.items():
            model = build_model(config, load_inputs(config), with_consensus=False).to(ranks.device)
            self.engines[name] = Engine(model, config, ranks, batch_layout(config, ranks), 1)
            self.engines[name].module.before_update(0, self.batches[0].micro_batches, ranks)
            self.engines[name].update(self.batches[0], 0)
            self.peaks[name] = peak_memory_bytes() / 2**30
        first = next(iter(self.engines.values())).module
        dim = base.backbone.hidden_dim
        self.products = LossProducts(first.num_items, dim, ranks)

    def refresh(self, name: str) -> float:
        """Seconds of one refresh of the shortlists."""
        module, batches = self.engines[name].module, self.batches[0].micro_batches
        if module.mltfr is None or not module.mltfr.uses_shortlist:
            return 0.0
        return min(timed(lambda: module.before_update(0, batches, self.ranks)) for _ in range(2))

    def seconds(self, rounds: int, peers: list[Process]) -> dict[str, float]:
        """Mean over the steps of the fastest time of each; peers have a turn after each round."""
        fastest: dict[tuple[str, int], float] = {}
        for number in range(rounds):
            # A step follows one of its own kind, as in training, and finds its cache.
            for first in range(0, len(self.batches), TURN):
                for name in (*self.engines, PRODUCTS):
                    for i in range(first, min(first + TURN, len(self.batches))):
                        taken = timed(lambda: self._step(name, i))  # noqa: B023
                        fastest[name, i] = min(taken, fastest.get((name, i), taken))
            for peer in peers:
                peer.turn()
            self.ranks.say(f"  round {number + 1}/{rounds}")
        count = len(self.batches)
        return {
            name: sum(fastest[name, i] for i in range(count)) / count
            for name in (*self.engines, PRODUCTS)
        }

    def _step(self, name: str, number: int) -> None:
        batches = self.batches[number]
        if name == PRODUCTS:
            self.products.step(batches)
        else:  # the norm is formed where it is logged
            every = self.configs[name].training.log_every_steps
            logged = (number + 1) % every == 0
            self.engines[name].update(batches, number, forms_norm=logged)

    def costs(self, rounds: int, peers: list[Process]) -> list[Cost]:
        """Of all contestants but the peers."""
        seconds = self.seconds(rounds, peers)
        sequences = sum(b.num_sequences for b in self.batches) / len(self.batches)
        positions = sum(b.num_targets for b in self.batches) / len(self.batches)
        result: dict[str, tuple[float, float]] = {}
        for name, step in seconds.items():
            refresh = 0.0 if name == PRODUCTS else self.refresh(name)
            every = (
                1 if name == PRODUCTS else self.configs[name].mltfr.filter.shortlist_refresh_steps
            )
            result[name] = (step + refresh / every, refresh)
        return [
            Cost(
                name,
                step_ms=1e3 * step,
                refresh_ms=1e3 * refresh,
                epoch_s=step * self.steps_per_epoch,
                sequences_s=sequences / step,
                positions_s=positions / step,
                of_bare=step / result.get("bare", (step, 0))[0],
                of_products=step / result[PRODUCTS][0],
                peak_gib=self.peaks.get(name, 0.0),
            )
            for name, (step, refresh) in result.items()
        ]

    def profile(self, name: str) -> str:
        """Where the steps of one contestant go: phases of an update, then operators by their own
        time.
        """
        from torch.profiler import ProfilerActivity, profile

        engine = self.engines[name]
        engine.stopwatch.take()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for i, batches in enumerate(self.batches):
                engine.update(batches, i)
        phases = engine.stopwatch.take()
        total, count = sum(phases.values()), len(self.batches)
        lines = [
            f"  {phase:<10} {1e3 * taken / count:>8.1f} ms a step {taken / total:>6.0%}"
            for phase, taken in phases.items()
        ]
        table = profiler.key_averages().table(
            sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=45
        )
        return "\n".join([f"{name}, by phase (with the profiler's own cost):", *lines, table])


def seconds_until(
    name: str, config: RunConfig, goal: float, most: int, ranks: Ranks
) -> tuple[float, int, float]:
    """Train one variant from its start until validation NDCG@10 is ``goal``, ``most`` epochs at
    most.

    Returns:
        Seconds of training and validation, epochs, and the NDCG@10 after the last.
    """
    layout = batch_layout(config, ranks)
    stream = train_stream(config, layout)
    model = build_model(config, load_inputs(config), ranks, with_consensus=False)
    engine = Engine(model.to(ranks.device), config, ranks, layout, most * stream.steps_per_epoch)
    valid, step, reached, started = ranked(config, "valid", ranks), 0, 0.0, synchronized()
    for epoch in range(most):
        engine.deepspeed.train()
        for batches in stream.epoch(epoch):
            engine.module.before_update(step, batches.micro_batches, ranks)
            seed_all(config.training.seed, 0, step, ranks.rank)
            output = step_totals(engine.update(batches, step, forms_norm=False), batches)
            engine.module.after_update(output.routing.gate if output.routing else None)
            step += 1
        engine.deepspeed.eval()
        reached = evaluate(ByModel(engine.module), valid, config.evaluation, ranks)["NDCG@10"]
        ranks.say(f"  {name}: NDCG@10 {reached:.4f} after {epoch + 1} epoch(s)")
        if reached >= goal:
            break
    return synchronized() - started, epoch + 1, reached


def peer_settings(contest: Contest, options: argparse.Namespace) -> dict[str, Any]:
    """What peers train: the same sizes, by as many threads."""
    backbone = next(iter(contest.configs.values())).backbone
    return {
        "batch": options.batch,
        "max_len": options.max_len,
        "dim": backbone.hidden_dim,
        "layers": backbone.num_layers,
        "heads": backbone.num_heads,
        "threads": torch.get_num_threads(),
        "share": options.peer_share,
    }


def say_peers(peers: list[Peer], bare_epoch: float, say: Callable[[str], None]) -> None:
    """A table of them."""
    for p in peers:
        say(
            f"{p.name:<10} {'':>9} {p.seconds:>6.1f} s {p.samples_s:>12,.0f} "
            f"{p.positions_s:>12,.0f} "
            f"{p.seconds / bare_epoch:>7.2f}x {'':>12} {'':>9} {p.peak_gib:>5.2f} GiB  "
            f"(timed: {p.timed})"
        )


def plot(epochs: dict[str, float], path: Path) -> None:
    """Seconds an epoch as bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 0.5 * len(epochs) + 1))
    bars = axes.barh(list(epochs), list(epochs.values()))
    of_bare = {name: seconds / epochs["bare"] for name, seconds in epochs.items()}
    axes.bar_label(bars, [f"{ratio:.2f} x bare" for ratio in of_bare.values()], padding=3)
    axes.set_xlabel("seconds an epoch")
    axes.margins(x=0.2)
    axes.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="prepared folder")
    parser.add_argument(
        "--tables", type=Path, help="folder of token tables; without it only the bare backbone runs"
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--max-len", type=int, default=100)
    parser.add_argument("--shortlist", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3, help="times that each step is made")
    parser.add_argument("--steps", type=int, default=8, help="steps of a round")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="of all but the peers")
    parser.add_argument(
        "--until",
        type=float,
        help="also train all but the published form until validation NDCG@10 is this",
    )
    parser.add_argument("--most-epochs", type=int, default=60, help="of --until")
    parser.add_argument("--peers", nargs="*", choices=INSTALL, help="without a name: all")
    parser.add_argument(
        "--peer-cache",
        type=Path,
        default=Path("~/.cache/mltfr-peers").expanduser(),
        help="where their environments are (3 GB)",
    )
    parser.add_argument(
        "--peer-share", type=float, default=1 / 16, help="of an epoch's batches, in each turn"
    )
    parser.add_argument("--json", type=Path, help="where the figures go")
    parser.add_argument("--plot", type=Path, help="where a plot goes (PNG, SVG)")
    parser.add_argument("--profile", choices=VARIANTS, help="also show where its steps go")
    return parser.parse_args()


def main() -> None:
    """Measure, print, write."""
    global clock
    options = parse()
    clock = CLOCKS[options.clock]
    ranks: Ranks = start_ranks(options.threads)
    contest = Contest(options, ranks)
    names = [] if options.peers is None else options.peers or list(INSTALL)
    settings = peer_settings(contest, options)
    waiting = [Process(n, options.peer_cache, options.data, settings) for n in names]
    costs = contest.costs(options.rounds, waiting)
    peers = [process.end() for process in waiting]
    speed = matrix_speed(ranks)
    flops = sum(contest.products.flops(b) for b in contest.batches) / len(contest.batches)
    machine = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}, {options.clock} time"
    )
    ranks.say(f"\n{options.data}, batch {options.batch}, {ranks.world_size} rank(s), {machine}")
    ranks.say(
        f"{'':<10} {'step':>9} {'epoch':>8} {'sequences/s':>12} {'positions/s':>12} "
        f"{'of bare':>8} {'of products':>12} {'refresh':>9} {'peak':>9}"
    )
    for c in costs:
        ranks.say(
            f"{c.name:<10} {c.step_ms:>6.1f} ms {c.epoch_s:>6.1f} s {c.sequences_s:>12,.0f} "
            f"{c.positions_s:>12,.0f} {c.of_bare:>7.2f}x {c.of_products:>11.2f}x "
            f"{c.refresh_ms:>6.0f} ms {c.peak_gib:>5.2f} GiB"
        )
    epochs = {c.name: c.epoch_s for c in costs} | {p.name: p.seconds for p in peers}
    say_peers(peers, epochs.get("bare", costs[0].epoch_s), ranks.say)
    work = flops * contest.steps_per_epoch / speed
    share = {name: work / seconds for name, seconds in epochs.items()}
    ranks.say(
        f"Matrix speed {speed / 1e9:.0f} GFLOP/s; the loss's products alone are, of a step's time "
        f"at it: " + ", ".join(f"{name} {value:.0%}" for name, value in share.items())
    )
    until = {}
    goal = options.until
    for name in (
        [n for n in contest.configs if n != "published"] if goal else []
    ):  # that takes hours
        config = contest.configs[name]
        until[name] = seconds_until(name, config, goal, options.most_epochs, ranks)
        taken, epochs_taken, reached = until[name]
        ranks.say(f"{name}: NDCG@10 {reached:.4f} after {epochs_taken} epochs, {taken:.0f} s")
    if options.profile:
        ranks.say(contest.profile(options.profile))
    if ranks.is_main and options.json:
        record = {
            "data": str(options.data),
            "machine": machine,
            "matrix_gflops": speed / 1e9,
            "share_of_matrix_speed": share,
            "costs": [asdict(c) for c in costs],
            "peers": [asdict(p) for p in peers],
            "until": {"goal": goal, "seconds_epochs_reached": until},
        }
        options.json.write_text(json.dumps(record, indent=2) + "\n")
    if ranks.is_main and options.plot:
        plot(epochs, options.plot)
    stop_ranks()


if __name__ == "__main__":
    main()
