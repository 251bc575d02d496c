"""Serving a model: time of one request and of a thousand, cold and warm, and memory.

    python benchmarks/serve.py runs/demo            # or an exported model
    python benchmarks/serve.py runs/demo --peers    # beside RecTools, where it is installed

Histories are drawn uniformly, of 5 to `max_len` items. Each measurement is a process of its own, so
that cold means cold. RecTools' SASRec is trained for one epoch on as many random interactions, with
the same sizes: its time counts, not its choice.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

REPEATS, MANY = 50, 1000


def draw(num_items: int, max_len: int, count: int) -> list[list[int]]:
    """Histories as places of items, 1..num_items."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, max_len + 1, count)
    return [rng.integers(1, num_items + 1, length).tolist() for length in lengths]


def seconds(work: Callable[[], object]) -> float:
    """By the clock."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


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
    cold = seconds(lambda: answer(histories[:1]))
    single = [seconds(lambda h=h: answer([h])) for h in histories[:REPEATS]]  # type: ignore[misc]
    before = peak_mib()
    return {
        "load_s": loaded,
        "first_ms": 1e3 * cold,
        "one_ms": 1e3 * statistics.median(single),
        "worst_ms": 1e3 * max(single),
        "thousand_s": seconds(lambda: answer(histories)),
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


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="run folder or export")
    parser.add_argument("--peers", action="store_true", help="also RecTools' SASRec, if installed")
    parser.add_argument("--only", choices=("ours", "rectools"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only == "ours":
        print(json.dumps(ours(options.model)))
        return
    if options.only == "rectools":
        import mltfr_dist

        model = mltfr_dist.load(options.model)
        config = model.config.backbone if hasattr(model, "config") else model.info.spec.backbone
        sizes = (len(model.item_ids) - 1, model.max_len, config.hidden_dim, config.num_layers)
        print(json.dumps(rectools(*sizes)))
        return
    arms = ["ours"]
    if options.peers and importlib.util.find_spec("rectools") is None:
        print("RecTools is not installed: `pip install rectools[torch]`.", file=sys.stderr)
    elif options.peers:
        arms.append("rectools")
    for arm in arms:
        command = [sys.executable, str(Path(__file__).resolve()), options.model, "--only", arm]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        print(arm, *(f"{name} {value:.1f}" for name, value in found.items()), sep="  ")


if __name__ == "__main__":
    main()
