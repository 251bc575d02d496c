"""Users ranked against many items, with and without kernels, by whole scores as before, by the bare
product, and by a peer.

Random states and item vectors; each user has a target and some seen items. Every way runs in a
process of its own, with the same threads, in turns, so that what else the machine does falls on
all; shown are the fastest and the median of the rounds. On a busy machine read processor times
(the least of the rounds, of all threads), by which speeds are compared. The bare product forms the
same scores in tiles and throws them away. Memory is what a process needs beyond inputs and imports.

RecTools' ranker finds the ten best of each user (it has no ranks); `--peers PYTHON` names the
interpreter of an environment with it, made as `stream_speed.py` tells.

    python benchmarks/ranking.py [--users 10000 --items 1000000 --dim 64 --threads 2]
        [--peers rt/bin/python] [--leave-out "ranks by whole scores"]
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
import torch
from torch import Tensor

MIB = 2**20
BATCH = 256
"""Users whose whole scores are held at a time, by default before."""


class Case(NamedTuple):
    """What is ranked."""

    hidden: Tensor
    vectors: Tensor
    """[I, D]."""
    targets: Tensor
    rows: Tensor
    item_ids: Tensor


def random_case(options: argparse.Namespace) -> Case:
    """The same for every way."""
    draws = torch.Generator().manual_seed(0)
    users, items = options.users, options.items
    rows = torch.arange(users).repeat_interleave(options.seen)
    return Case(
        torch.randn(users, options.dim, generator=draws),
        torch.randn(items, options.dim, generator=draws),
        torch.randint(1, items + 1, (users,), generator=draws),
        rows,
        torch.randint(1, items + 1, (len(rows),), generator=draws),
    )


def ranks(case: Case) -> Tensor:
    """Ranks [B], as `mltfr_dist` finds them."""
    from mltfr_dist.models.rank_counts import count_better
    from mltfr_dist.models.tiles import Pairs, exact_scores

    everyone, targets = torch.arange(len(case.hidden)), case.targets
    exclude = Pairs(torch.cat([case.rows, everyone]), torch.cat([case.item_ids, targets]))
    target_scores = exact_scores(case.hidden, case.vectors[targets - 1])
    positions = count_better(case.hidden, case.vectors, target_scores, exclude=exclude)
    return 1 + positions.better + positions.equal


def ten_best(case: Case) -> Tensor:
    """The ten best items of each user [B, 10], as `mltfr_dist` finds them."""
    from mltfr_dist.models.tiles import Pairs
    from mltfr_dist.models.top_items import top_items

    return top_items(case.hidden, case.vectors, 10, exclude=Pairs(case.rows, case.item_ids))[1]


def ranks_by_whole_scores(case: Case) -> Tensor:
    """Ranks [B], as `mltfr_dist` found them before: all scores of a batch of users."""
    result, padded = [], torch.cat([torch.zeros(1, case.vectors.shape[1]), case.vectors])
    for start in range(0, len(case.hidden), BATCH):
        stop = start + BATCH
        scores = case.hidden[start:stop] @ padded.T
        scores[:, 0] = -torch.inf
        targets = case.targets[start:stop, None]
        here = (case.rows >= start) & (case.rows < stop)
        target_scores = scores.gather(1, targets)
        seen = case.rows[here] - start, case.item_ids[here]
        scores = scores.index_put(seen, scores.new_tensor(-torch.inf))
        scores = scores.scatter(1, targets, target_scores)
        target_scores = scores.gather(1, targets)
        assert not scores.isnan().any()
        better = (scores > target_scores).sum(1)
        result.append(better + 1 + (scores == target_scores).sum(1) - 1)
    return torch.cat(result)


def bare_product(case: Case) -> None:
    """The scores alone, tile by tile."""
    from mltfr_dist.models.tiles import CPU_ELEMENTS, USERS

    width = CPU_ELEMENTS // USERS
    buffer = torch.empty(CPU_ELEMENTS)
    for start in range(0, len(case.vectors), width):
        vectors = case.vectors[start : start + width]
        for first in range(0, len(case.hidden), USERS):
            hidden = case.hidden[first : first + USERS]
            scores = buffer[: len(hidden) * len(vectors)].view(len(hidden), len(vectors))
            torch.mm(hidden, vectors.T, out=scores)


def rectools_ten_best(case: Case) -> None:
    """RecTools' ranker, whose product and sort are torch's."""
    from rectools.models.rank import Distance, TorchRanker
    from scipy import sparse

    users, items = len(case.hidden), len(case.vectors)
    pairs = case.rows.numpy(), case.item_ids.numpy() - 1
    seen = sparse.csr_matrix((np.ones(len(pairs[0]), np.float32), pairs), shape=(users, items))
    ranker = TorchRanker(Distance.DOT, "cpu", case.hidden, case.vectors, batch_size=128)
    ranker.rank(subject_ids=np.arange(users), k=10, filter_pairs_csr=seen)


PLAIN = ", no kernels"
WAYS: dict[str, Callable[[Case], object]] = {
    "bare product": bare_product,
    "ranks": ranks,
    f"ranks{PLAIN}": ranks,
    "ranks by whole scores": ranks_by_whole_scores,
    "ten best": ten_best,
    f"ten best{PLAIN}": ten_best,
    "RecTools, ten best": rectools_ten_best,
}


def measure(options: argparse.Namespace) -> None:
    """One way, in this process: seconds by the clock and of processors, and memory beyond the
    inputs.
    """
    torch.set_num_threads(options.threads)
    few = argparse.Namespace(**(vars(options) | {"users": 2, "items": 1000}))
    WAYS[options.way](random_case(few))  # imports, and what else comes once
    case = random_case(options)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started, used = time.perf_counter(), time.process_time()
    measured = WAYS[options.way](case)
    seconds, processor = time.perf_counter() - started, time.process_time() - used
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    checksum = int(measured.sum()) if isinstance(measured, Tensor) else 0
    result = {"seconds": seconds, "processor": processor, "bytes": more, "sum": checksum}
    print(json.dumps(result))


def run_way(way: str, options: argparse.Namespace) -> dict[str, float]:
    """What :func:`measure` found, in a process of its own."""
    python = options.peers if way.startswith("RecTools") else sys.executable
    sizes = [f"--{n}={getattr(options, n)}" for n in ("users", "items", "dim", "seen", "threads")]
    command = [python, str(Path(__file__).resolve()), *sizes, "--way", way]
    kernels = {"MLTFR_KERNELS": "off"} if way.endswith(PLAIN) else {}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | kernels)
    if done.returncode:
        raise SystemExit(f"{way} failed:\n{done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def print_table(result: dict[str, list[dict[str, float]]]) -> None:
    """A line for each way, measured in some rounds."""
    bare = min(one["processor"] for one in result["bare product"])
    names = ("way", "fastest, s", "median, s", "processor, s", "of the bare product's speed")
    print(f"| {' | '.join(names)} | memory, MiB |")
    print("|---|---|---|---|---|---|")
    for way, measured in result.items():
        seconds = [one["seconds"] for one in measured]
        processor = min(one["processor"] for one in measured)
        memory = max(one["bytes"] for one in measured) / MIB
        print(
            f"| {way} | {min(seconds):.1f} | {statistics.median(seconds):.1f} | {processor:.1f} | "
            f"{bare / processor:.2f} | {memory:,.0f} |"
        )


def main() -> None:
    """Measure every way in turns and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--users", type=int, default=10_000)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--seen", type=int, default=20, help="items of a user's history")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", help="Python of an environment with RecTools")
    parser.add_argument("--leave-out", nargs="*", choices=WAYS, default=[], help="ways")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        return measure(options)
    left_out = {*options.leave_out} | ({"RecTools, ten best"} if not options.peers else set())
    ways = [way for way in WAYS if way not in left_out]
    result: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(options.rounds):
        for way in ways:
            result[way].append(run_way(way, options))
    print_table(result)
    if not options.peers:
        print("RecTools was not measured: --peers names no Python.")
    sums = {way: result[way][0]["sum"] for way in ways}
    for what in ("ranks", "ten best"):
        if what in sums and sums.get(what + PLAIN, sums[what]) != sums[what]:
            raise SystemExit(f"{what} differ with and without kernels")
    if len({sums[way] for way in ("ranks", "ranks by whole scores") if way in sums}) > 1:
        print("Ranks differ where the last bits of whole scores decide.")
    return None


if __name__ == "__main__":
    main()
