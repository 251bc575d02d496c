"""Serving a model: time of one request and of a thousand, cold and warm, and memory.

    python benchmarks/serve.py runs/demo            # or an exported model
    python benchmarks/serve.py runs/demo --rectools PYTHON --replay PYTHON

Histories are drawn uniformly, of 5 to `max_len` items, and ten items are asked for. Each
measurement is a process of its own with one thread, so that cold means cold. Times are by the clock
and, as `cpu`, of the processor, which other processes on the machine change less.

PYTHON is the interpreter of an environment with `rectools[torch]` or `replay-rec[torch]`. Their
SASRec has the same sizes: RecTools' is trained for one epoch on as many random interactions, and
recommends to users of that data set; RePlay's has drawn weights, and is called as a service would
call it (forward pass, seen items out, topk; 256 histories at a time), for it has no call that takes
histories. Their time counts, not their choice. Neither has MLTFR's filter and experts: compare a
bare run with them.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

REPEATS, MANY = 50, 1000


def draw(num_items: int, max_len: int, count: int) -> list[list[int]]:
    """Histories as places of items, 1..num_items."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, max_len + 1, count)
    return [rng.integers(1, num_items + 1, length).tolist() for length in lengths]


class Took(NamedTuple):
    """Seconds."""

    clock: float
    cpu: float


def took(work: Callable[[], object]) -> Took:
    """By the clock, and of the processor."""
    clock, cpu = time.perf_counter(), time.process_time()
    work()
    return Took(time.perf_counter() - clock, time.process_time() - cpu)


def peak_mib() -> float:
    """Of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measured(
    load: Callable[[], Callable[[list[list[int]]], object]], histories: list[list[int]]
) -> dict[str, float]:
    """What loading and answering cost; ``load`` gives what recommends ten items to each history."""
    began = time.perf_counter()
    answer = load()
    loaded = time.perf_counter() - began
    cold = took(lambda: answer(histories[:1]))
    single = [took(lambda h=h: answer([h])) for h in histories[:REPEATS]]  # type: ignore[misc]
    before = peak_mib()
    many = took(lambda: answer(histories))
    return {
        "load_s": loaded,
        "first_ms": 1e3 * cold.clock,
        "one_ms": 1e3 * statistics.median(t.clock for t in single),
        "one_cpu_ms": 1e3 * statistics.median(t.cpu for t in single),
        "worst_ms": 1e3 * max(t.clock for t in single),
        "thousand_s": many.clock,
        "thousand_cpu_s": many.cpu,
        "thousand_mib": peak_mib() - before,
        "peak_mib": peak_mib(),
    }


def ours(folder: str) -> dict[str, float]:
    """A run, or an export."""
    import mltfr_dist

    model = mltfr_dist.load(folder)
    ids = model.item_ids
    histories = [[ids[n] for n in row] for row in draw(len(ids) - 1, model.max_len, MANY)]

    def load() -> Callable[[list[list[int]]], object]:
        fresh = mltfr_dist.load(folder)
        return lambda rows: fresh.recommend(rows, k=10)

    return measured(load, histories)  # type: ignore[arg-type]


def rectools(num_items: int, max_len: int, dim: int, layers: int) -> dict[str, float]:
    """Its SASRec of the same sizes."""
    import pandas as pd
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel

    histories = draw(num_items, max_len, MANY)
    rows = [
        (user, item, place) for user, row in enumerate(histories) for place, item in enumerate(row)
    ]
    frame = pd.DataFrame(rows, columns=["user_id", "item_id", "datetime"])
    frame["datetime"] = pd.to_datetime(frame["datetime"], unit="s")
    frame["weight"] = 1.0
    data = Dataset.construct(frame)
    model = SASRecModel(
        n_blocks=layers, n_factors=dim, n_heads=2, session_max_len=max_len, epochs=1
    )
    model.fit(data)

    def load() -> Callable[[list[list[int]]], object]:
        return lambda rows: model.recommend(
            users=list(range(len(rows))), dataset=data, k=10, filter_viewed=True
        )

    return measured(load, histories)


def replay(num_items: int, max_len: int, dim: int, layers: int) -> dict[str, float]:
    """Its SASRec of the same sizes."""
    import torch
    from replay.data import FeatureHint, FeatureSource, FeatureType
    from replay.data.nn import TensorFeatureInfo, TensorFeatureSource, TensorSchema
    from replay.nn.sequential import SasRec

    item = TensorFeatureInfo(
        "item_id",
        is_seq=True,
        feature_type=FeatureType.CATEGORICAL,
        embedding_dim=dim,
        padding_value=num_items,
        cardinality=num_items,
        feature_hint=FeatureHint.ITEM_ID,
        feature_sources=[TensorFeatureSource(FeatureSource.INTERACTIONS, "item_id")],
    )
    sizes = {"embedding_dim": dim, "num_blocks": layers, "max_sequence_length": max_len}
    model = SasRec.from_params(TensorSchema([item]), num_heads=2, **sizes).eval()

    @torch.no_grad()
    def some(rows: list[list[int]]) -> torch.Tensor:
        ids = torch.full((len(rows), max_len), num_items)  # items are 0..num_items - 1
        for row, history in zip(ids, rows, strict=True):
            row[-len(history) :] = torch.tensor(history) - 1
        scores = model({"item_id": ids}, ids != num_items)["logits"]
        for row, history in zip(scores, rows, strict=True):
            row[torch.tensor(history) - 1] = -torch.inf
        return scores.topk(10).indices

    def answer(rows: list[list[int]]) -> list[torch.Tensor]:
        return [some(rows[start : start + 256]) for start in range(0, len(rows), 256)]

    return measured(lambda: answer, draw(num_items, max_len, MANY))


PEERS = {"rectools": rectools, "replay": replay}


def sizes_of(folder: str) -> list[int]:
    """Items, positions, numbers of a state and blocks of a model."""
    import mltfr_dist

    model = mltfr_dist.load(folder)
    config = model.config.backbone if hasattr(model, "config") else model.info.spec.backbone
    return [len(model.item_ids) - 1, model.max_len, config.hidden_dim, config.num_layers]


def told(python: str, *arguments: str) -> dict[str, float]:
    """What a measurement in a process of its own found."""
    command = [python, str(Path(__file__).resolve()), *arguments]
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=one_thread)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    """Print a line a library."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="run folder or export")
    for name in PEERS:
        parser.add_argument(f"--{name}", metavar="PYTHON", help=f"interpreter that has {name}")
    parser.add_argument("--only", choices=("ours", *PEERS), help=argparse.SUPPRESS)
    parser.add_argument("--sizes", type=int, nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        result = PEERS[options.only](*options.sizes) if options.sizes else ours(options.model)
        print(json.dumps(result))
        return
    print(f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}")
    measurements = {"ours": told(sys.executable, options.model, "--only", "ours")}
    for name in PEERS:
        if python := getattr(options, name):
            sizes = [str(size) for size in sizes_of(options.model)]
            arguments = (options.model, "--only", name, "--sizes", *sizes)
            measurements[name] = told(python, *arguments)
        else:
            print(f"{name} is left out: --{name} names no interpreter that has it")
    for name, result in measurements.items():
        print(name, *(f"{what} {value:.1f}" for what, value in result.items()), sep="  ")


if __name__ == "__main__":
    main()
