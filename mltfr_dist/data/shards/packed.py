"""Many sequences in three flat arrays, as a block of a shard holds them.

A shard is a tar file; a member of it is one block of many sequences (one sequence a member reads
1000 times slower):

* ``<key>.items.npy``: item ids of all sequences, one after the other (smallest unsigned type that
  fits num_items)
* ``<key>.offsets.npy``: where each sequence begins, from 0, and the end of the last: n + 1 numbers
  (uint32 or uint64)
* ``<key>.users.npy``: user_index of each sequence (smallest unsigned type that fits)
* ``<key>.targets.npy``, only where users may have several targets: how many items at the end of
  each sequence are targets (uint32)

Shapes: n sequences of a block, T items of all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
ARRAYS = ("items.npy", "offsets.npy", "users.npy")
TARGETS = "targets.npy"


@dataclass(frozen=True)
class PackedSequences:
    """Many sequences in flat arrays.

    Attributes:
        items: [T] item ids, oldest first within a sequence.
        offsets: [n + 1] int64; sequence i is ``items[offsets[i]:offsets[i + 1]]``.
        users: [n] user_index.
        targets: [n] int64, how many items at the end of each sequence are targets, 1 at least;
            None: of a validation or test sequence the last.
    """

    items: np.ndarray
    offsets: np.ndarray
    users: np.ndarray
    targets: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, index: int) -> np.ndarray:
        """Item ids of one sequence, a view. Negative indices count from the end."""
        position = range(len(self))[index]
        return self.items[self.offsets[position] : self.offsets[position + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """[n] int64, items of each sequence."""
        return np.diff(self.offsets)

    @property
    def num_targets(self) -> np.ndarray:
        """[n] int64, items at the end of each sequence that are targets."""
        return np.ones(len(self), np.int64) if self.targets is None else self.targets

    def distinct_targets(self) -> tuple[np.ndarray, np.ndarray]:
        """The targets of all sequences in order, an item that comes again in one once.

        Returns:
            [T] number of each one's sequence, ascending, and its item id.
        """
        counts, ends = self.num_targets, np.cumsum(self.num_targets)
        rows = np.repeat(np.arange(len(self)), counts)
        indices = np.arange(len(rows)) + np.repeat(self.offsets[1:] - ends, counts)
        items = self.items[indices].astype(np.int64)
        if self.targets is None:
            return rows, items
        pairs = rows * (int(items.max(initial=0)) + 1) + items
        first = np.sort(np.unique(pairs, return_index=True)[1])
        return rows[first], items[first]

    def run(self, start: int, end: int) -> PackedSequences:
        """The sequences from ``start`` up to ``end``, views."""
        offsets = self.offsets[start : end + 1]
        return PackedSequences(
            self.items[offsets[0] : offsets[-1]],
            offsets - offsets[0],
            self.users[start:end],
            None if self.targets is None else self.targets[start:end],
        )

    def take(self, indices: np.ndarray | Sequence[int]) -> PackedSequences:
        """The sequences at ``indices`` [m], in that order (repeats allowed), without a Python
        loop.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        lengths = self.lengths[chosen]
        offsets = _offsets(lengths)
        # Position j of the result belongs to sequence i; it lies j - offsets[i] after that
        # sequence's old start.
        sources = np.repeat(self.offsets[:-1][chosen] - offsets[:-1], lengths) + np.arange(
            offsets[-1]
        )
        targets = None if self.targets is None else self.targets[chosen]
        return PackedSequences(self.items[sources], offsets, self.users[chosen], targets)

    @staticmethod
    def concatenate(blocks: Sequence[PackedSequences]) -> PackedSequences:
        """All sequences of ``blocks``, in order. At least one block is needed, and all or none have
        ``targets``.
        """
        targets = [block.targets for block in blocks if block.targets is not None]
        return PackedSequences(
            np.concatenate([block.items for block in blocks]),
            _offsets(np.concatenate([block.lengths for block in blocks])),
            np.concatenate([block.users for block in blocks]),
            np.concatenate(targets) if targets else None,
        )


def _offsets(lengths: np.ndarray) -> np.ndarray:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def unsigned_type(maximum: int) -> np.dtype[Any]:
    """The smallest unsigned integer type that holds ``maximum``."""
    return np.min_scalar_type(maximum)


def length_counts(blocks: Sequence[PackedSequences]) -> tuple[tuple[int, int], ...]:
    """(items, number of sequences with as many), ascending."""
    counts = np.bincount(np.concatenate([block.lengths for block in blocks]))
    lengths = np.flatnonzero(counts)
    return tuple(zip(lengths.tolist(), counts[lengths].tolist()))
