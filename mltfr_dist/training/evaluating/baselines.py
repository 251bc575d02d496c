"""Baselines that need no training loop: they tell whether a model has learned anything at all.

Shapes: B users, I items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import psutil
import torch
from scipy import sparse
from torch import Tensor

from mltfr_dist.data.batch import PADDING_IDX, RankingBatch
from mltfr_dist.data.shards.packed import PackedSequences
from mltfr_dist.distributed.watchdog import heartbeat
from mltfr_dist.errors import ConfigError
from mltfr_dist.training.evaluating.rankers import SameForAll, Scorer

_PAIRS_AT_ONCE = 2_000_000
"""Pairs of items that are compared at a time: about 60 MB."""
_NEIGHBOUR_BYTES = 16
"""Of a similarity and its item."""


RECENT = 5
"""Items at the end of a training sequence that are recent: prepared data holds no times."""

Through = Callable[[Sequence[Any]], Iterable[Any]]
"""Work in parts, which may end between two of them."""


def popularity(train: PackedSequences, num_items: int, *, through: Through = iter) -> Scorer:
    """Every user gets the items that occur most often in training."""
    return _same_for_all(np.bincount(train.items, minlength=num_items + 1))


def recent_popularity(train: PackedSequences, num_items: int, *, through: Through = iter) -> Scorer:
    """Every user gets the items that occur most often among the last :data:`RECENT` of a
    sequence.
    """
    from_end = np.repeat(train.offsets[1:], train.lengths) - np.arange(len(train.items))
    return _same_for_all(np.bincount(train.items[from_end <= RECENT], minlength=num_items + 1))


def _same_for_all(counts: np.ndarray) -> SameForAll:
    scores = torch.from_numpy(counts.astype(np.float32))
    del counts  # 8 bytes an item
    return SameForAll(scores)


def markov_chain(train: PackedSequences, num_items: int, *, through: Through = iter) -> Scorer:
    """How often each item follows the last one of the history in training; of equal ones the
    popular.

    A chain of the first order (Rendle et al. 2010, without factors). Popularity is added as a
    share, which is below 1 and so only orders what follows equally often.
    """
    starts = np.zeros(len(train.items) + 1, bool)
    starts[train.offsets] = True
    follows = np.flatnonzero(~starts[:-1])  # positions that have one before them
    counts = sparse.csr_matrix(
        (np.ones(len(follows)), (train.items[follows - 1], train.items[follows])),
        shape=(num_items + 1, num_items + 1),
    )
    share = np.bincount(train.items, minlength=num_items + 1) / (len(train.items) + 1)

    def score(batch: RankingBatch) -> Tensor:
        last = (batch.item_ids != PADDING_IDX).sum(1) - 1
        items = batch.item_ids.gather(1, last.clamp(min=0)[:, None])[:, 0].cpu().numpy()
        scores = torch.from_numpy(counts[items].toarray() + share).to(batch.item_ids.device)
        scores[:, 0] = -torch.inf
        return scores

    return score


def item_knn(
    train: PackedSequences,
    num_items: int,
    *,
    num_neighbours: int = 100,
    shrinkage: float = 10.0,
    through: Through = iter,
) -> Scorer:
    """Item-based nearest neighbours (Sarwar et al. 2001): sum of similarities to the items of the
    history.

    Similarity is the cosine of the items' user sets, shrunk for rare items; each item keeps its
    ``num_neighbours`` nearest (of equal ones those of lower id). A training part of one item adds
    nothing to what two items share, but a user to its item's set. Memory: the training items,
    ``num_neighbours`` an item, and :data:`_PAIRS_AT_ONCE` pairs, however many items a user has.
    The blocks of items that are worked on at a time are taken ``through`` what may end them.

    Raises:
        ConfigError: The neighbours of all items may not fit the free memory.
    """
    rows = np.repeat(np.arange(len(train)), np.diff(train.offsets))
    seen = sparse.csr_matrix(
        (np.ones(len(rows), np.float32), (rows, train.items)), shape=(len(train), num_items + 1)
    )
    seen.data[:] = 1.0  # a user's repeats count once
    norms = np.sqrt(np.asarray(seen.sum(0)).ravel())
    users_of = seen.T.tocsr()
    # An item meets at most as many others as its users have items, and never more than all.
    met = np.minimum(users_of @ np.diff(seen.indptr), num_items)
    _check_memory(met, num_neighbours)
    blocks = []
    for start, end in through(list(_blocks(met))):
        heartbeat()
        together = (users_of[start:end] @ seen).tocsr()
        blocks.append(_nearest(together, norms, start, num_neighbours, shrinkage))
    neighbours = sparse.vstack(blocks, format="csr")

    def score(batch: RankingBatch) -> Tensor:
        users = len(batch.item_ids)
        data = np.ones(len(batch.seen_rows), np.float32)
        history = sparse.csr_matrix(
            (data, (batch.seen_rows.cpu().numpy(), batch.seen_items.cpu().numpy())),
            shape=(users, num_items + 1),
        )
        history.data[:] = 1.0
        scores = torch.from_numpy(
            sparse.csr_matrix(history @ neighbours).toarray().astype(np.float32)
        ).to(batch.item_ids.device)
        scores[:, 0] = -torch.inf
        return scores

    return score


def _check_memory(met: np.ndarray, number: int) -> None:
    """Refuse ItemKNN where its neighbours do not fit.

    Args:
        met: [items] how many others each may have.
        number: neighbours that are kept of each.

    Raises:
        ConfigError: They do not.
    """
    kept = int(np.minimum(met, number).sum())
    needed, free = 2 * _NEIGHBOUR_BYTES * kept, psutil.virtual_memory().available
    if needed > free:
        raise ConfigError(
            f"The baseline item_knn may need {needed / 2**30:.1f} GiB for {kept:,} neighbours of "
            f"{len(met) - 1:,} items, and {free / 2**30:.1f} GiB are free.",
            rule="ItemKNN keeps the nearest items of each item in memory, and holds them twice "
            "while it puts them together.",
            remedy="Leave item_knn out of `baselines`; popularity needs 8 bytes an item.",
        )


def _blocks(met: np.ndarray) -> Iterator[tuple[int, int]]:
    """Runs of items, start and end, that have at most :data:`_PAIRS_AT_ONCE` pairs, or one item.

    Args:
        met: [items] how many others each meets at most.
    """
    sums = np.cumsum(met)
    start = 0
    while start < len(met):
        before = sums[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(sums, before + _PAIRS_AT_ONCE, side="right")))
        yield start, end
        start = end


def _nearest(
    together: sparse.csr_matrix, norms: np.ndarray, start: int, number: int, shrinkage: float
) -> sparse.csr_matrix:
    """Counts of common users -> similarities of the nearest items.

    Args:
        together: [n, items] common users of the items from ``start`` on and of all.
        norms: [items] root of each item's users.
        start: the first item.
        number: neighbours to keep of each.
        shrinkage: added to the denominator.
    """
    columns, ends = together.indices, together.indptr
    rows = np.repeat(np.arange(len(ends) - 1), np.diff(ends))
    similarity = together.data / (norms[rows + start] * norms[columns] + shrinkage)
    similarity[rows + start == columns] = 0
    kept = similarity > 0
    for row in np.flatnonzero(np.diff(ends) > number):
        values = similarity[ends[row] : ends[row + 1]]
        least = np.partition(values, -number)[-number]
        nearer = values > least
        equal = np.flatnonzero((values == least) & (values > 0))
        by_id = np.argsort(columns[ends[row] : ends[row + 1]][equal])
        nearer[equal[by_id[: number - int(nearer.sum())]]] = True
        kept[ends[row] : ends[row + 1]] = nearer
    return sparse.csr_matrix((similarity[kept], (rows[kept], columns[kept])), shape=together.shape)
