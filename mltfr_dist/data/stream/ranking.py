"""Batches for full ranking of a split: the same users in a batch at any world size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from mltfr_dist.data.batch import PADDING_IDX, RankingBatch
from mltfr_dist.data.shards.manifest import load_manifest
from mltfr_dist.data.shards.packed import PackedSequences
from mltfr_dist.data.shards.reader import read_shard
from mltfr_dist.data.stream.collate import padded_rows


class RankingStream:
    """Batches of one rank for full ranking of a split ("valid" or "test").

    Batch i holds the same users at any world size, and each rank has a run of consecutive batches,
    so that it reads only the shards that hold them; ranks that run out get batches of empty rows,
    so that all take part in every collective.
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        max_len: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        left_out: tuple[str, ...] = (),
    ) -> None:
        self.folder, self.max_len, self.batch_size, self.rank, self.world_size = (
            folder,
            max_len,
            batch_size,
            rank,
            world_size,
        )
        self.manifest = load_manifest(folder, left_out=left_out)
        self.split = self.manifest.splits[split]

    @property
    def num_users(self) -> int:
        """Users that are ranked, over all ranks."""
        return self.split.num_sequences

    def __iter__(self) -> Iterator[RankingBatch]:
        batches = -(-self.num_users // self.batch_size)
        rounds = -(-batches // self.world_size)
        first = self.rank * rounds
        given = max(0, min(rounds, batches - first))
        start = first * self.batch_size
        for sequences in self._batches(first, first + given):
            numbers = torch.arange(start, start + len(sequences))
            yield ranking_batch(sequences, self.max_len)._replace(numbers=numbers)
            start += len(sequences)
        for _ in range(rounds - given):
            empty = torch.zeros(0, dtype=torch.int64)
            yield RankingBatch(
                torch.zeros(1, 1, dtype=torch.int64), torch.full((1,), PADDING_IDX), empty, empty
            )

    def _batches(self, first: int, end: int) -> Iterator[PackedSequences]:
        """Batches ``first`` up to ``end``, reading a shard when its first user is due."""
        starts = np.cumsum([0, *(info.num_sequences for info in self.split.shards)])
        loaded: dict[int, PackedSequences] = {}
        for batch in range(first, end):
            users = np.arange(
                batch * self.batch_size, min((batch + 1) * self.batch_size, self.num_users)
            )
            shards = np.searchsorted(starts, users, side="right") - 1
            needed = np.unique(shards).tolist()
            loaded = {number: loaded[number] for number in needed if number in loaded}
            for number in needed:
                if number not in loaded:
                    loaded[number] = read_shard(
                        self.folder, self.split.shards[number], num_items=self.manifest.num_items
                    )
            yield PackedSequences.concatenate(
                [loaded[i].take(users[shards == i] - starts[i]) for i in needed]
            )


def ranking_batch(sequences: PackedSequences, max_len: int) -> RankingBatch:
    """Sequences whose last item is the target -> a batch of their last ``max_len`` history
    items.
    """
    everyone = np.arange(len(sequences))
    starts, ends = sequences.offsets[:-1], sequences.offsets[1:]
    kept = np.minimum(ends - starts, max_len + 1)
    recent = padded_rows(sequences.items, ends - kept, ends, len(sequences))
    targets = recent[everyone, kept - 1].copy()
    recent[everyone, kept - 1] = PADDING_IDX
    rows = np.repeat(everyone, ends - starts)
    is_history = np.ones(len(sequences.items), dtype=bool)
    is_history[ends - 1] = False
    return RankingBatch(
        torch.from_numpy(recent[:, : max(1, recent.shape[1] - 1)].copy()),
        torch.from_numpy(targets),
        torch.from_numpy(rows[is_history]),
        torch.from_numpy(sequences.items[is_history].astype(np.int64)),
    )
