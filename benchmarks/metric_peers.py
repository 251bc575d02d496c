"""Metrics with several targets a user beside those of `ir_measures` and RecTools.

    python benchmarks/metric_peers.py --peers PYTHON

PYTHON is the interpreter of an environment with `ir_measures` and `rectools`. Scores, histories and
targets are drawn; ranks are this program's, from :func:`rank_users`, and the peers get the lists in
the order of the scores. It prints the largest difference of each metric and fails above 1e-9.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

USERS, ITEMS, CUTOFFS = 2000, 300, (1, 5, 10, 20)
TOLERANCE = 1e-9


def ours(path: Path) -> dict[str, float]:
    """This program's metrics of drawn users, whose lists and targets go to ``path``."""
    import torch

    from mltfr_dist.config import EvaluationConfig
    from mltfr_dist.data.batch import RankingBatch
    from mltfr_dist.distributed.ranks import ALONE
    from mltfr_dist.training.evaluating.evaluate import rank_users
    from mltfr_dist.training.evaluating.rankers import ByScores

    draws = torch.Generator().manual_seed(0)
    scores = torch.randn(USERS, ITEMS + 1, generator=draws)
    scores[:, 0] = -torch.inf
    targets, target_rows, seen, seen_rows = [], [], [], []
    lists = []
    for user in range(USERS):
        order = (torch.randperm(ITEMS, generator=draws) + 1).tolist()
        number, length = torch.randint(1, 30, (2,), generator=draws).tolist()
        own, history = order[:number], order[number - number // 5 :][:length]  # some are in both
        targets.append(own)
        target_rows += [user] * number
        seen += history
        seen_rows += [user] * length
        row = scores[user].clone()
        row[[item for item in history if item not in own]] = -torch.inf
        candidates = int(row.isfinite().sum())
        lists.append(row.argsort(descending=True)[:candidates].tolist())
    pairs = {(user, item) for user, own in enumerate(targets) for item in own}
    again = [pair in pairs for pair in zip(seen_rows, seen, strict=True)]
    batch = RankingBatch(
        torch.ones(USERS, 1).long(),
        torch.tensor([item for own in targets for item in own]),
        torch.tensor(seen_rows),
        torch.tensor(seen),
        torch.arange(USERS),
        torch.tensor(target_rows),
        torch.tensor(again),
    )
    place = ByScores(lambda block: scores[block.numbers], ITEMS)
    result = rank_users(place, [batch], EvaluationConfig(), ALONE)
    path.write_text(json.dumps({"lists": lists, "targets": targets}))
    return result.metrics(CUTOFFS)


def of_ir_measures(drawn: dict[str, list[list[int]]]) -> dict[str, float]:
    """By the names of this program."""
    import ir_measures
    from ir_measures import AP, RR, P, R, Success, nDCG

    run = {
        str(user): {str(item): -float(place) for place, item in enumerate(items)}
        for user, items in enumerate(drawn["lists"])
    }
    qrels = {
        str(user): {str(item): 1 for item in items} for user, items in enumerate(drawn["targets"])
    }
    kinds = {"HR": Success, "NDCG": nDCG, "MAP": AP, "Precision": P, "Recall": R}
    names = {kind @ k: f"{name}@{k}" for name, kind in kinds.items() for k in CUTOFFS}
    names[RR] = "MRR"
    return {
        names[kind]: value for kind, value in ir_measures.calc_aggregate(names, qrels, run).items()
    }


def of_rectools(drawn: dict[str, list[list[int]]]) -> dict[str, float]:
    """By the names of this program; NDCG by the achievable ideal."""
    import pandas as pd
    from rectools.metrics import MAP, MRR, NDCG, HitRate, Precision, Recall, calc_metrics

    def frame(rows: list[list[int]]) -> pd.DataFrame:
        return pd.DataFrame(
            [(u, i, n) for u, items in enumerate(rows) for n, i in enumerate(items, 1)],
            columns=["user_id", "item_id", "rank"],
        )

    metrics = {"MRR": MRR(k=ITEMS)}
    for k in CUTOFFS:
        metrics |= {f"HR@{k}": HitRate(k=k), f"Recall@{k}": Recall(k=k)}
        metrics |= {f"Precision@{k}": Precision(k=k), f"MAP@{k}": MAP(k=k)}
        metrics[f"NDCG@{k}"] = NDCG(k=k, divide_by_achievable=True)
    interactions = frame(drawn["targets"])[["user_id", "item_id"]]
    return calc_metrics(metrics, frame(drawn["lists"]), interactions)


PEERS = {"ir_measures": of_ir_measures, "RecTools": of_rectools}


def main() -> None:
    """Draw, measure, compare; exit code 1 where anything differs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", required=True, help="Python of an environment with both")
    parser.add_argument("--of", nargs=2, metavar=("PEER", "DRAWN"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.of:
        print(json.dumps(PEERS[options.of[0]](json.loads(Path(options.of[1]).read_text()))))
        return
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder) / "drawn.json"
        result = ours(drawn)
        for peer in PEERS:
            command = [options.peers, __file__, "--peers", "", "--of", peer, str(drawn)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            theirs = json.loads(done.stdout.splitlines()[-1])
            assert theirs.keys() == result.keys(), theirs.keys() ^ result.keys()
            for name in ("HR", "NDCG", "MAP", "Precision", "Recall", "MRR"):
                different = max(
                    abs(result[full] - theirs[full]) for full in result if full.startswith(name)
                )
                worst = max(worst, different)
                print(f"{peer:12} {name:10} {different:.1e}")
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
