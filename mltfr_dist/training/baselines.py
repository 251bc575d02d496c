"""Baselines that need no training loop: they tell whether a model has learned anything at all.

Shapes: B users, I items.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from mltfr_dist.data.batch import RankingBatch
from mltfr_dist.data.shards import Manifest, PackedSequences, read_shard
from mltfr_dist.data.short_parts import one_item_parts
from mltfr_dist.training.evaluate import Scorer


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


def popularity(train: PackedSequences, num_items: int) -> Scorer:
    """Every user gets the items that occur most often in training."""
    counts = torch.from_numpy(np.bincount(train.items, minlength=num_items + 1).astype(np.float32))
    counts[0] = -torch.inf

    def score(batch: RankingBatch) -> Tensor:
        return counts.to(batch.item_ids.device).expand(len(batch.target_ids), -1).clone()

    return score


def item_knn(
    train: PackedSequences, num_items: int, *, num_neighbours: int = 100, shrinkage: float = 10.0
) -> Scorer:
    """Item-based nearest neighbours (Sarwar et al. 2001): sum of similarities to the items of the history.

    Similarity is the cosine of the items' user sets, shrunk for rare items; each item keeps its ``num_neighbours``
    nearest. A training part of one item adds nothing to what two items share, but a user to its
    item's set.
    """
    rows = np.repeat(np.arange(len(train)), np.diff(train.offsets))
    seen = sparse.csr_matrix(
        (np.ones(len(rows), np.float32), (rows, train.items)), shape=(len(train), num_items + 1)
    )
    seen.data[:] = 1.0  # a user's repeats count once
    together = (seen.T @ seen).tocoo()
    norms = np.sqrt(np.asarray(seen.sum(0)).ravel())
    similarity = together.data / (norms[together.row] * norms[together.col] + shrinkage)
    similarity[together.row == together.col] = 0
    order = np.lexsort((together.col, -similarity, together.row))
    by_row = together.row[order]
    place = np.arange(len(by_row)) - np.searchsorted(by_row, by_row)  # rank within the row
    nearest = order[place < num_neighbours]
    neighbours = sparse.csr_matrix(
        (similarity[nearest], (together.row[nearest], together.col[nearest])),
        shape=(num_items + 1, num_items + 1),
    )

    def score(batch: RankingBatch) -> Tensor:
        users = len(batch.target_ids)
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
