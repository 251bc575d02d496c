"""Batches for full ranking of a split: the same targets in a batch at any world size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mltfr_dist.data.batch import PADDING_IDX, RankingBatch
from mltfr_dist.data.shards.manifest import load_manifest
from mltfr_dist.data.shards.packed import IntArray, PackedSequences
from mltfr_dist.data.shards.reader import read_shard
from mltfr_dist.data.stream.collate import padded_rows


@dataclass(frozen=True)
class _Targets:
    """Users in the order of the split, and what is to be ranked for them. T targets."""

    sequences: PackedSequences
    rows: IntArray
    """[T] number of each target's sequence, ascending; every sequence has one."""
    item_ids: IntArray
    """[T]."""
    first: int
    """Index of the first sequence in the split."""

    def run(self, start: int, end: int) -> _Targets:
        """The targets from ``start`` up to ``end``, one at least."""
        first, last = int(self.rows[start]), int(self.rows[end - 1])
        return _Targets(
            self.sequences.run(first, last + 1),
            self.rows[start:end] - first,
            self.item_ids[start:end],
            self.first + first,
        )

    @staticmethod
    def concatenate(blocks: list[_Targets]) -> _Targets:
        """All targets of consecutive ``blocks``, at least one."""
        starts = np.cumsum([0, *(len(block.sequences) for block in blocks)])
        return _Targets(
            PackedSequences.concatenate([block.sequences for block in blocks]),
            np.concatenate([block.rows + start for block, start in zip(blocks, starts)]),
            np.concatenate([block.item_ids for block in blocks]),
            blocks[0].first,
        )


class RankingStream:
    """Batches of one rank for full ranking of a split ("valid" or "test").

    Batch i holds the same targets at any world size, and each rank has a run of consecutive
    batches, so that it reads only the shards that hold them; ranks that run out get batches of
    empty rows, so that all take part in every collective. A user with several targets has one row
    in a batch, and in the next one, too, where the targets go on there.
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
        once_a_user: bool = False,
    ) -> None:
        """Args: once_a_user: whether each user comes once, with the first target alone."""
        self.folder, self.max_len, self.batch_size, self.rank, self.world_size = (
            folder,
            max_len,
            batch_size,
            rank,
            world_size,
        )
        self.manifest = load_manifest(folder, left_out=left_out)
        self.split = self.manifest.splits[split]
        self.once_a_user = once_a_user

    @property
    def num_users(self) -> int:
        """Users that are ranked, over all ranks."""
        return self.split.num_sequences

    @property
    def num_targets(self) -> int:
        """Targets that are ranked, over all ranks."""
        return self.num_users if self.once_a_user else self.split.num_targets

    def __iter__(self) -> Iterator[RankingBatch]:
        batches = -(-self.num_targets // self.batch_size)
        rounds = -(-batches // self.world_size)
        first = self.rank * rounds
        given = max(0, min(rounds, batches - first))
        for targets in self._batches(first, first + given):
            yield _ranking_batch(targets, self.max_len)
        for _ in range(rounds - given):
            empty = torch.zeros(0, dtype=torch.int64)
            yield RankingBatch(
                torch.zeros(1, 1, dtype=torch.int64), torch.full((1,), PADDING_IDX), empty, empty
            )

    def _batches(self, first: int, end: int) -> Iterator[_Targets]:
        """Batches ``first`` up to ``end``, reading a shard when its first target is due."""
        shards = self.split.shards
        counts = [info.num_sequences for info in shards]
        users = np.cumsum([0, *counts])
        if not self.once_a_user:
            counts = [info.num_targets or info.num_sequences for info in shards]
        starts = np.cumsum([0, *counts])
        loaded: dict[int, _Targets] = {}
        for batch in range(first, end):
            start = batch * self.batch_size
            stop = min(start + self.batch_size, self.num_targets)
            needed = range(*np.searchsorted(starts, [start, stop - 1], side="right") - [1, 0])
            loaded = {number: loaded[number] for number in needed if number in loaded}
            for number in needed:
                if number not in loaded:
                    loaded[number] = self._read(number, int(users[number]))
            yield _Targets.concatenate(
                [
                    loaded[i].run(max(0, start - starts[i]), min(stop - starts[i], counts[i]))
                    for i in needed
                ]
            )

    def _read(self, number: int, first: int) -> _Targets:
        info, num_items = self.split.shards[number], self.manifest.num_items
        sequences = read_shard(self.folder, info, num_items=num_items)
        rows, item_ids = sequences.distinct_targets()
        if self.once_a_user:
            chosen = np.flatnonzero(np.diff(rows, prepend=-1))
            rows, item_ids = rows[chosen], item_ids[chosen]
        return _Targets(sequences, rows, item_ids, first)


def _ranking_batch(targets: _Targets, max_len: int) -> RankingBatch:
    """The last ``max_len`` items of each history before its targets, and the targets."""
    sequences, everyone = targets.sequences, np.arange(len(targets.sequences))
    starts, lengths = sequences.offsets[:-1], sequences.lengths - sequences.num_targets
    ends, kept = starts + lengths, np.minimum(lengths, max_len)
    recent = padded_rows(sequences.items, ends - kept, ends, len(sequences))
    rows = np.repeat(everyone, lengths)
    indices = np.arange(len(rows)) + np.repeat(starts + lengths - np.cumsum(lengths), lengths)
    seen = sequences.items[indices].astype(np.int64)
    batch = RankingBatch(
        torch.from_numpy(recent[:, : max(1, int(kept.max()))].copy()),
        torch.from_numpy(targets.item_ids),
        torch.from_numpy(rows),
        torch.from_numpy(seen),
        torch.from_numpy(targets.first + everyone),
    )
    if sequences.targets is None:
        return batch
    of_users = sequences.distinct_targets()
    again = np.isin(_pairs(rows, seen), _pairs(*of_users))
    return batch._replace(
        target_rows=torch.from_numpy(targets.rows), seen_targets=torch.from_numpy(again)
    )


def _pairs(rows: IntArray, item_ids: IntArray) -> IntArray:
    """[n] one number of each (row, item)."""
    return (rows << 32) + item_ids
