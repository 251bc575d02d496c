"""What a model recommends to the users of a split, and what is measured of it (list_metrics.py).

The lists are those of `recommend`: the best items by their exact scores, of equal ones the lower
ids, found in tiles. Whether seen items are left out is `evaluation.filter_seen`; a target that the
history holds is then left out, too, for nobody knows it when the list is made. Shapes: B users of a
batch, U of the split, K items of a list, I items, W words.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from mltfr_dist.config import RunConfig
from mltfr_dist.data.batch import PADDING_IDX, RankingBatch
from mltfr_dist.data.shards.manifest import Manifest
from mltfr_dist.data.shards.reader import read_shard
from mltfr_dist.data.shards.short_parts import one_item_parts
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.distributed.watchdog import heartbeat
from mltfr_dist.list_metrics import Lists, list_metrics
from mltfr_dist.models.divided_rows import division_of
from mltfr_dist.models.search import best as best_of
from mltfr_dist.models.tiles import Pairs
from mltfr_dist.models.top_items import top_items
from mltfr_dist.training.evaluating.evaluate import of_all_ranks
from mltfr_dist.training.evaluating.rankers import HELD_SCORES, Scorer, targets_of
from mltfr_dist.training.streams import ranking_stream

Lister = Callable[[RankingBatch], Tensor]
"""A ranking batch -> item ids [B, K], best first; 0 where there are fewer candidates."""


def lister(model: nn.Module, num_items: int, k: int, *, filter_seen: bool) -> Lister:
    """What lists the ``k`` best items by a model; of a divided item table all ranks must call."""
    division = division_of(model)

    def best(batch: RankingBatch) -> Tensor:
        none = batch.seen_rows[:0]
        seen = Pairs(batch.seen_rows, batch.seen_items) if filter_seen else Pairs(none, none)

        def read(hidden: Tensor, vectors: Tensor) -> Tensor:
            if division is None:
                return top_items(hidden, vectors, k, exclude=seen)[1]
            return division.top_items(hidden, vectors, k, seen, num_items)[1]

        lists: Tensor = model(batch, read=read)
        return lists

    return best


def lister_by_scores(score: Scorer, num_items: int, k: int, *, filter_seen: bool) -> Lister:
    """What lists the ``k`` best items by a baseline, some users' scores at a time."""
    at_once, items = max(1, HELD_SCORES // (num_items + 1)), torch.arange(1, num_items + 1)

    def best(batch: RankingBatch) -> Tensor:
        lists = []
        for start in range(0, len(batch.target_ids), at_once):
            users = targets_of(batch, start, start + at_once)
            scores = score(users)
            if filter_seen:
                scores[users.seen_rows, users.seen_items] = -torch.inf
            ids = items.to(scores.device).expand(len(scores), -1)
            values, ids = best_of(scores[:, 1:], ids, k)
            lists.append(ids.where(values > -torch.inf, PADDING_IDX))
        return torch.cat(lists)

    return best


def measure_lists(
    best: Lister,
    split: str,
    config: RunConfig,
    manifest: Manifest,
    ranks: Ranks,
    titles: Sequence[str | None],
) -> dict[str, float]:
    """What the lists of a split's users are like (list_metrics.py); see :func:`recommended`."""
    stream = ranking_stream(config, split, ranks, once_a_user=True)
    lists = recommended(best, stream, config, manifest, ranks, titles)
    return list_metrics(lists, config.evaluation.cutoffs)


@torch.no_grad()
def recommended(
    best: Lister,
    stream: Iterable[RankingBatch],
    config: RunConfig,
    manifest: Manifest,
    ranks: Ranks,
    titles: Sequence[str | None],
) -> Lists:
    """The lists of all users of a split, in its order, on every rank; all ranks must call.

    Memory: 4 K + 16 bytes a user, and the words of the titles.

    Args:
        best: The model's :func:`lister`.
        stream: This rank's users; the ranks' streams together hold every user once.
        config: The run.
        manifest: Its prepared data.
        ranks: All processes.
        titles: [I + 1] of the items; index 0 is padding.
    """
    interactions, users, num_users = training_users(config, manifest)
    of_items = torch.from_numpy(interactions).to(ranks.device)
    numbers, lists, histories = [], [], []
    for batch in stream:
        heartbeat()
        batch = batch.to(ranks.device)
        present = batch.target_ids != PADDING_IDX
        lists.append(best(batch)[present].int())
        assert batch.numbers is not None or not present.any()
        numbers.append(batch.target_ids[:0] if batch.numbers is None else batch.numbers[present])
        histories.append(_means(of_items, batch)[present])
    everyone, items, means = (
        of_all_ranks(torch.cat(blocks), ranks) for blocks in (numbers, lists, histories)
    )
    order = everyone.argsort(stable=True)
    words = title_words(titles) if any(titles) else None
    return Lists(items[order].numpy(), means[order].numpy(), interactions, users, num_users, words)


def _means(of_items: Tensor, batch: RankingBatch) -> Tensor:
    """[B] mean of ``of_items`` [I + 1] over each full history; float64 sums of whole numbers."""
    sums = torch.zeros(len(batch.target_ids), dtype=torch.float64, device=of_items.device)
    sums.index_add_(0, batch.seen_rows, of_items[batch.seen_items].double())
    lengths = torch.bincount(batch.seen_rows, minlength=len(sums))
    return sums / lengths.clamp(min=1)


def training_users(config: RunConfig, manifest: Manifest) -> tuple[np.ndarray, np.ndarray, int]:
    """Of each item its training interactions and the training sequences that hold it [I + 1], and
    the number of training sequences; those of one item are counted. One shard in memory at a time.
    """
    size, folder = manifest.num_items + 1, config.data.path
    interactions, users = np.zeros(size, np.int64), np.zeros(size, np.int64)
    for info in manifest.splits["train"].shards:
        sequences = read_shard(folder, info, num_items=manifest.num_items)
        interactions += np.bincount(sequences.items, minlength=size)
        whose = np.repeat(np.arange(len(sequences)), sequences.lengths)
        pairs = np.unique(whose * size + sequences.items)
        users += np.bincount(pairs % size, minlength=size)
    single_items = one_item_parts(folder, manifest, interactions)
    alone = np.bincount(single_items, minlength=size)
    num_users = manifest.splits["train"].num_sequences + len(single_items)
    return interactions + alone, users + alone, num_users


def title_words(titles: Sequence[str | None]) -> Any:
    """[I + 1, W] sparse: the different words of each title, in small letters, weighed by how few
    titles hold them (log(I / count)), as unit vectors; zero where no word says anything.
    """
    words = [sorted(set(re.findall(r"\w+", (title or "").lower()))) for title in titles]
    counts = Counter(word for title in words for word in title)
    column_of = {word: column for column, word in enumerate(sorted(counts))}
    weights = {word: math.log((len(titles) - 1) / count) for word, count in counts.items()}
    kept = [[word for word in title if weights[word] > 0] for title in words]
    norms = [math.sqrt(math.fsum(weights[word] ** 2 for word in title)) for title in kept]
    values = [weights[word] / norm for title, norm in zip(kept, norms) for word in title]
    columns = [column_of[word] for title in kept for word in title]
    ends = np.cumsum([0, *map(len, kept)])
    return sparse.csr_matrix((values, columns, ends), (len(titles), max(1, len(column_of))))
