"""What the ranks of test_ranking.py do; started by torchrun, writes its findings as JSON.

Usage: ranking_worker.py ranked FOLDER OUTPUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from worker import make_engine, no_dropout

from mltfr_dist.distributed.meeting import leave, start_ranks, stop_ranks
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.list_metrics import list_metrics
from mltfr_dist.training.evaluating.evaluate import rank_users
from mltfr_dist.training.evaluating.lists import lister, recommended
from mltfr_dist.training.evaluating.rankers import ByModel, MeanLoss
from mltfr_dist.training.inputs import load_inputs
from mltfr_dist.training.items import load_items
from mltfr_dist.training.streams import ranking_stream

CASES = {
    "sasrec": {},
    "bert4rec": {"backbone__name": "bert4rec"},
    "several targets": {"data__path": "all"},
}
BATCHES = {0: (7, 120), 3: (7,)}
"""ZeRO stage to users at a time."""


def ranked(folder: Path, ranks: Ranks) -> dict[str, list[float]]:
    """By backbone, ZeRO stage and batch: metrics, lists and ranks of all users, and the mean
    loss.
    """
    result = {}
    for name, changes in CASES.items():
        for stage, sizes in BATCHES.items():
            config = no_dropout(folder, stage, **changes)
            data = config.data.model_copy(update={"path": folder / config.data.path})
            config = config.model_copy(update={"data": data})
            engine = make_engine(config, ranks)
            engine.deepspeed.eval()
            manifest, titles = load_inputs(config).manifest, load_items(config).titles
            for size in sizes:
                evaluation = config.evaluation.model_copy(update={"batch_size": size})
                stream = ranking_stream(
                    config.model_copy(update={"evaluation": evaluation}), "valid", ranks
                )
                loss = MeanLoss(ranks)
                users = rank_users(ByModel(engine.module, loss), stream, evaluation, ranks)
                metrics = users.metrics(evaluation.cutoffs)
                best = lister(engine.module, manifest.num_items, 10, filter_seen=True)
                everyone = ranking_stream(config, "valid", ranks, once_a_user=True)
                lists = recommended(best, everyone, config, manifest, ranks, titles)
                listed = [*list_metrics(lists, (5, 10)).values(), *lists.items.ravel().tolist()]
                key = f"{name}, ZeRO {stage}, {size} users"
                result[key] = [*metrics.values(), *listed, *users.ranks.tolist(), loss.mean()]
            engine.destroy()
    return result


if __name__ == "__main__":
    _, folder, output = sys.argv[1:]
    torch.set_num_threads(1)
    all_ranks = start_ranks(1)
    result = ranked(Path(folder), all_ranks)
    if all_ranks.is_main:
        Path(output).write_text(json.dumps(result))
    stop_ranks()
    leave()
