"""What the test metrics are made of: slices of targets by their popularity and by the length of
their user's history.

A prior from language models has most to give where training data is thin, so a mean over all users
can hide it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mltfr_dist.config import RunConfig
from mltfr_dist.data.batch import PADDING_IDX, RankingBatch
from mltfr_dist.data.shards.manifest import Manifest
from mltfr_dist.data.shards.packed import IntArray
from mltfr_dist.data.shards.reader import read_shard
from mltfr_dist.data.shards.short_parts import one_item_parts

BLOCK = 1 << 20
"""Items that are looked at together."""


@dataclass(frozen=True)
class Slices:
    """A target belongs to one third by its item and to one by its user's history.

    Attributes:
        item_third: [num_items + 1] 0, 1, 2: the third of the items, ordered by training
            interactions, that each lies in (equal numbers: by item id; the thirds hold equally many
            items).
        short, long: a history is short up to ``short`` items and long from ``long`` on: the thirds
            of the lengths of the sequences that are trained on (of 2 items or more).
    """

    item_third: Tensor
    short: int
    long: int

    NAMES = (
        "item_rare",
        "item_middle",
        "item_common",
        "history_short",
        "history_middle",
        "history_long",
    )

    def members(self, batch: RankingBatch) -> Tensor:
        """[T, 6] bool, in the order of ``NAMES``; rows that only fill the batch belong nowhere."""
        third = self.item_third.to(batch.target_ids.device)[batch.target_ids].long()
        of_rows = torch.bincount(batch.seen_rows, minlength=len(batch.item_ids))
        length = batch.of_targets(of_rows)  # of the full history
        by_length = (length > self.short).long() + (length >= self.long).long()
        groups = torch.stack([third, by_length + 3], dim=1)
        member = torch.zeros(
            len(third), len(self.NAMES), dtype=torch.bool, device=third.device
        ).scatter(1, groups, value=True)
        return member & (batch.target_ids != PADDING_IDX)[:, None]


def training_slices(config: RunConfig, manifest: Manifest) -> Slices:
    """Slices by what the training split holds."""
    counts, lengths = training_counts(config, manifest)
    third = thirds_of_items(counts)
    short, long = (int(v) for v in np.quantile(lengths, (1 / 3, 2 / 3), method="higher"))
    return Slices(torch.from_numpy(third), short, max(long, short + 1))


def thirds_of_items(counts: IntArray) -> npt.NDArray[np.int8]:
    """[num_items + 1] counts -> ``item_third``; some bytes an item beside them."""
    of_items, third = counts[1:], np.zeros(len(counts), np.int8)
    ordered = of_items.astype(np.min_scalar_type(int(counts.max())))
    ordered.sort()
    for number in (1, 2):
        start = -(-number * len(of_items) // 3)  # the first item of the next third, rounded up
        if start == len(of_items):
            continue
        equal = of_items == ordered[start]
        below = start - int(np.searchsorted(ordered, ordered[start]))  # of equal ones, by item id
        equal[: _nth(equal, below)] = False
        third[1:] += equal | (of_items > ordered[start])
    return third


def _nth(flags: npt.NDArray[np.bool_], number: int) -> int:
    """Index of the flag that is set and has ``number`` such before it."""
    for start in range(0, len(flags), BLOCK):
        block = flags[start : start + BLOCK]
        count = int(np.count_nonzero(block))
        if number < count:
            return start + int(np.flatnonzero(block)[number])
        number -= count
    raise IndexError("fewer flags are set")


def training_counts(config: RunConfig, manifest: Manifest) -> tuple[IntArray, IntArray]:
    """How often each item occurs in training, and the length of each stored training sequence.

    One pass over the shards, one shard in memory at a time.

    Returns:
        [num_items + 1] counts, and [sequences] lengths.
    """
    counts = np.zeros(manifest.num_items + 1, np.int64)
    lengths = [np.zeros(0, np.int64)]
    for info in manifest.splits["train"].shards:
        sequences = read_shard(config.data.path, info, num_items=manifest.num_items)
        np.add.at(counts, sequences.items, 1)
        lengths.append(sequences.lengths)
    np.add.at(counts, one_item_parts(config.data.path, manifest, counts), 1)
    return counts, np.concatenate(lengths)
