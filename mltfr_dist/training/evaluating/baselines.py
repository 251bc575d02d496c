"""Baselines that need no training loop: they tell whether a model has learned anything at all.

None of them holds scores of users x items. Shapes: B users, I items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from mltfr_dist.data.batch import RankingBatch
from mltfr_dist.data.shards.manifest import Manifest
from mltfr_dist.data.shards.packed import PackedSequences
from mltfr_dist.data.shards.reader import read_shard
from mltfr_dist.data.shards.short_parts import one_item_parts
from mltfr_dist.distributed.watchdog import heartbeat
from mltfr_dist.models.places import Places
from mltfr_dist.models.tiles import Pairs

_PAIRS_AT_ONCE = 2_000_000
"""Pairs of items that are compared at a time: about 60 MB."""


def training_sequences(folder: Path, manifest: Manifest) -> PackedSequences:
    """All training sequences of a prepared data set; those of one item stand behind the others."""
    shards = manifest.splits["train"].shards
    stored = PackedSequences.concatenate(
        [read_shard(folder, info, num_items=manifest.num_items) for info in shards]
    )
    counts = np.bincount(stored.items, minlength=manifest.num_items + 1)
    items = one_item_parts(folder, manifest, counts)
    nobody = np.full(len(items), -1)  # whose they are is not kept
    return PackedSequences.concatenate(
        [stored, PackedSequences(items, np.arange(len(items) + 1), nobody)]
    )


class Popularity:
    """Every user gets the items that occur most often in training."""

    def __init__(self, train: PackedSequences, num_items: int) -> None:
        """Args: train: [n] sequences; num_items: I."""
        counts = np.bincount(train.items, minlength=num_items + 1)
        self.counts = torch.from_numpy(counts)
        self._sorted = self.counts[1:].sort().values

    def __call__(self, batch: RankingBatch, exclude: Pairs) -> Places:
        """Place each row's target: all items of a higher count, less those that are excluded."""
        counts = self.counts.to(batch.target_ids.device)
        targets, in_order = counts[batch.target_ids], self._sorted.to(counts.device)
        up_to, below = (torch.searchsorted(in_order, targets, right=r) for r in (True, False))
        rows, item_ids = _distinct(exclude, len(counts))
        others, own = counts[item_ids], targets[rows]
        excluded = [
            torch.zeros_like(targets).index_add_(0, rows, which.to(targets.dtype))
            for which in (others > own, others == own)
        ]
        return Places(len(in_order) - up_to - excluded[0], up_to - below - excluded[1])


class ItemKNN:
    """Sums of similarities to the items of the history, as :func:`item_knn` makes it."""

    def __init__(self, neighbours: sparse.csr_matrix) -> None:
        """Args: neighbours: [I + 1, I + 1] similarities of each item's nearest."""
        self._neighbours = neighbours

    def scores(self, batch: RankingBatch) -> sparse.csr_matrix:
        """[B, I + 1] fp32, those that are not 0."""
        rows, items = batch.seen_rows.cpu().numpy(), batch.seen_items.cpu().numpy()
        shape = len(batch.target_ids), self._neighbours.shape[0]
        history = sparse.csr_matrix((np.ones(len(rows), np.float32), (rows, items)), shape=shape)
        history.data[:] = 1.0
        return sparse.csr_matrix(history @ self._neighbours).astype(np.float32)

    def __call__(self, batch: RankingBatch, exclude: Pairs) -> Places:
        """Place each row's target; what is not among the scores scores 0."""
        scores, target_ids = self.scores(batch), batch.target_ids.cpu().numpy()
        num_rows, width = scores.shape
        rows = np.repeat(np.arange(num_rows), np.diff(scores.indptr))
        of_target, hits = np.zeros(num_rows, np.float32), scores.indices == target_ids[rows]
        of_target[rows[hits]] = scores.data[hits]
        out_rows, out_items = (part.cpu().numpy() for part in _distinct(exclude, width))
        left_out = np.isin(rows * width + scores.indices, out_rows * width + out_items)
        rows, values = rows[~left_out], scores.data[~left_out]
        better = np.bincount(rows[values > of_target[rows]], minlength=num_rows)
        equal = np.bincount(rows[values == of_target[rows]], minlength=num_rows)
        nonzero = np.bincount(rows, minlength=num_rows)
        zero = width - 1 - nonzero - np.bincount(out_rows, minlength=num_rows)
        equal += np.where(of_target == 0, zero, 0)
        device = batch.target_ids.device
        return Places(*(torch.from_numpy(part).to(device) for part in (better, equal)))


def _distinct(pairs: Pairs, width: int) -> tuple[Tensor, Tensor]:
    """Rows and items of ``pairs``, each pair once; items lie below ``width``."""
    codes = torch.unique(pairs.rows * width + pairs.item_ids)
    return codes // width, codes % width


def item_knn(
    train: PackedSequences,
    num_items: int,
    *,
    num_neighbours: int = 100,
    shrinkage: float = 10.0,
    through: Callable[[Sequence[tuple[int, int]]], Iterable[tuple[int, int]]] = iter,
) -> ItemKNN:
    """Item-based nearest neighbours (Sarwar et al. 2001): sum of similarities to the items of the history.

    Similarity is the cosine of the items' user sets, shrunk for rare items; each item keeps its
    ``num_neighbours`` nearest (of equal ones those of lower id). A training part of one item adds
    nothing to what two items share, but a user to its item's set. Memory: the training items,
    ``num_neighbours`` an item, and :data:`_PAIRS_AT_ONCE` pairs, however many items a user has.
    The blocks of items that are worked on at a time are taken ``through`` what may end them.
    """
    rows = np.repeat(np.arange(len(train)), np.diff(train.offsets))
    seen = sparse.csr_matrix(
        (np.ones(len(rows), np.float32), (rows, train.items)), shape=(len(train), num_items + 1)
    )
    seen.data[:] = 1.0  # a user's repeats count once
    norms = np.sqrt(np.asarray(seen.sum(0)).ravel())
    users_of = seen.T.tocsr()
    blocks = []
    for start, end in through(list(_blocks(users_of, seen))):
        heartbeat()
        together = (users_of[start:end] @ seen).tocsr()
        blocks.append(_nearest(together, norms, start, num_neighbours, shrinkage))
    return ItemKNN(sparse.vstack(blocks, format="csr"))


def _blocks(users_of: sparse.csr_matrix, seen: sparse.csr_matrix) -> Iterator[tuple[int, int]]:
    """Runs of items, start and end, that have at most :data:`_PAIRS_AT_ONCE` pairs, or one item.

    Args:
        users_of: [items, users].
        seen: [users, items].
    """
    # An item meets at most as many others as its users have items, and never more than all.
    met = np.minimum(users_of @ np.diff(seen.indptr), users_of.shape[0])
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
