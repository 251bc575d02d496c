"""The order of an epoch, known from the index of shard sizes alone: nothing is read.

It depends on (seed, epoch): the order of shards is shuffled, and the samples of ``shuffle_shards``
consecutive shards (a *window*) are shuffled together. A *position* counts from 0 in that order.
Global batch s holds a run of positions, or, where batches are grouped by length, one of the batches
that a *pool* of consecutive positions is sorted into.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mltfr_dist.config import DataConfig
from mltfr_dist.data.shards.manifest import SplitInfo
from mltfr_dist.data.shards.packed import IntArray
from mltfr_dist.errors import DataError


def num_pieces(lengths: IntArray, max_len: int) -> IntArray:
    """Sliding windows of ``max_len`` inputs that sequences of ``lengths`` items are cut into."""
    return np.maximum(1, -(-(lengths - 1) // max_len))


def samples_by_shard(split: SplitInfo, config: DataConfig, folder: Path) -> IntArray:
    """[S] samples of each shard: its sequences, the windows that they are cut into, or prefixes.

    Raises:
        DataError: windows or prefixes, and a manifest of a version that did not count lengths yet.
    """
    prefixes, windows = config.samples == "prefixes", config.long_histories == "windows"
    if not prefixes and not windows:
        return np.array([shard.num_sequences for shard in split.shards], dtype=np.int64)
    counts = []
    for shard in split.shards:
        if shard.lengths is None:
            raise DataError(
                f"{folder} was prepared by a version that did not count the lengths of its "
                f"histories.",
                rule=f"{'data.samples=prefixes' if prefixes else 'data.long_histories=windows'} "
                "needs them, to know the number of steps without reading.",
                remedy="Run `mltfr prepare` again with this version, into a new folder.",
            )
        lengths, sequences = np.array(shard.lengths, dtype=np.int64).T
        pieces = num_pieces(lengths, config.max_len)
        if prefixes:
            pieces = lengths - 1 if windows else np.minimum(lengths - 1, config.max_len)
        counts.append(int((pieces * sequences).sum()))
    return np.array(counts, dtype=np.int64)


@dataclass(frozen=True)
class EpochOrder:
    """The order of one epoch.

    Attributes:
        counts: [S] samples of each shard.
        shuffle_shards: shards of a window.
        seed: seed of the run.
        epoch: number of the epoch.
    """

    counts: IntArray
    shuffle_shards: int
    seed: int
    epoch: int

    @cached_property
    def windows(self) -> list[list[int]]:
        """Shard numbers of each window, in order."""
        order = np.random.default_rng((self.seed, self.epoch, 0)).permutation(len(self.counts))
        width = self.shuffle_shards
        return [sorted(order[i : i + width].tolist()) for i in range(0, len(order), width)]

    @cached_property
    def starts(self) -> IntArray:
        """[windows + 1] first position of each window, and the number of all."""
        sizes = [int(self.counts[shards].sum()) for shards in self.windows]
        return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])

    def permutation(self, window: int) -> IntArray:
        """Which of the window's samples (its shards' ones, in order) each position holds."""
        size = int(self.starts[window + 1] - self.starts[window])
        return np.random.default_rng((self.seed, self.epoch, 1, window)).permutation(size)

    def window_of(self, positions: IntArray) -> IntArray:
        """[n] window of each position."""
        return np.searchsorted(self.starts, positions, side="right") - 1

    def grouped(self, pool: int, lengths: IntArray, batch_size: int) -> list[IntArray]:
        """The batches of a pool in their order: indices into the pool, of samples of like length.

        Args:
            pool: its number.
            lengths: [n] items of each of its samples.
            batch_size: samples of a batch; one of the batches may have fewer.
        """
        by_length = np.argsort(lengths, kind="stable")
        batches = [by_length[i : i + batch_size] for i in range(0, len(by_length), batch_size)]
        order = np.random.default_rng((self.seed, self.epoch, 2, pool)).permutation(len(batches))
        return [batches[i] for i in order]
