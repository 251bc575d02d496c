"""Sequences of one global batch to one rank's batches: what is predicted, at which positions,
against what.

Everything that is drawn here is a function of (seed, epoch, step or sample, position): the same at
any division.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mltfr_dist.config import DataConfig
from mltfr_dist.data.batch import PADDING_IDX, SequenceBatch
from mltfr_dist.data.shards.packed import IntArray, PackedSequences
from mltfr_dist.data.stream.augment import Draws, ViewRatios, augmented_views, cloze_mask
from mltfr_dist.data.stream.negatives import (
    UNSEEN,
    NegativeRule,
    Proposal,
    sample_negatives,
    sample_shared,
)
from mltfr_dist.data.stream.order import num_pieces
from mltfr_dist.errors import ConfigError


@dataclass(frozen=True)
class Objective:
    """What a batch holds for the loss."""

    num_negatives: int = 0
    """Negatives of each position."""
    negative_rule: NegativeRule = UNSEEN
    """Which items these may be."""
    num_shared_negatives: int = 0
    """Negatives that all positions of a global batch share."""
    proposal: Proposal = "uniform"
    """Distribution of the shared ones."""
    cloze_ratio: float | None = None
    """Share of positions to mask and predict; None: every position predicts the next item."""
    views: ViewRatios | None = None
    """Two augmented views of each history, where given."""
    group_size: int = 1
    """Sequences that must stay together in one micro-batch."""


class Samples(NamedTuple):
    """What is trained on: parts of histories that lie in one flat array, n of them."""

    items: npt.NDArray[np.integer]
    """[T] item ids."""
    starts: IntArray
    """[n] where each sample begins; its first item is only ever read."""
    ends: IntArray
    """[n] where it ends; its last item is only ever a target (but of a cloze task)."""
    history_starts: IntArray
    """[n] where the user's whole history begins, which negatives must avoid."""
    history_ends: IntArray
    """[n] where that ends."""

    @property
    def lengths(self) -> IntArray:
        """[n] items of each sample."""
        return self.ends - self.starts

    def take(self, chosen: IntArray | slice) -> Samples:
        """Some of them, over the same items."""
        return Samples(self.items, *(array[chosen] for array in self[1:]))

    @staticmethod
    def of(sequences: PackedSequences, config: DataConfig) -> Samples:
        """The samples of whole histories: their last ``max_len`` + 1 items, windows, or prefixes.

        Windows are as long and slide. Those of one history share an item, the last target of one
        and the first input of the next, so that each item but the first is a target once. They
        follow each other oldest first, and the newest is always full where one is. Each of those
        targets ends a prefix, which begins up to ``max_len`` items before it: within the last
        ``max_len`` + 1 items, or with windows anywhere.
        """
        starts, ends, max_len = sequences.offsets[:-1], sequences.offsets[1:], config.max_len
        recent = np.maximum(starts, ends - max_len - 1)
        if config.samples == "prefixes":
            firsts = starts if config.long_histories == "windows" else recent
            targets = ends - firsts - 1
            first, begin, end = (np.repeat(a, targets) for a in (firsts, starts, ends))
            before = np.repeat(np.cumsum(targets) - targets, targets)  # prefixes of older histories
            prefix_ends = first + np.arange(targets.sum()) - before + 2
            prefix_starts = np.maximum(first, prefix_ends - max_len - 1)
            return Samples(sequences.items, prefix_starts, prefix_ends, begin, end)
        if config.long_histories == "truncate":
            return Samples(sequences.items, recent, ends, starts, ends)
        pieces = num_pieces(ends - starts, max_len)
        history_starts, history_ends = np.repeat(starts, pieces), np.repeat(ends, pieces)
        newer = (
            np.repeat(np.cumsum(pieces), pieces) - np.arange(pieces.sum()) - 1
        )  # windows of the history behind this one
        piece_ends = history_ends - newer * max_len
        return Samples(
            sequences.items,
            np.maximum(history_starts, piece_ends - max_len - 1),
            piece_ends,
            history_starts,
            history_ends,
        )

    @staticmethod
    def join(several: Sequence[Samples]) -> Samples:
        """All samples of ``several``, in order, with copies of the histories they need and nothing
        else.
        """
        copies = []
        for some in several:
            sizes = some.history_ends - some.history_starts
            begins = np.cumsum(sizes) - sizes
            indices = np.repeat(some.history_starts - begins, sizes) + np.arange(sizes.sum())
            moved = begins - some.history_starts
            copies.append((some.items[indices], *(array + moved for array in some[1:])))
        shifts = np.cumsum([0, *(len(copy[0]) for copy in copies[:-1])])
        rest = (
            np.concatenate([copy[i] + shift for copy, shift in zip(copies, shifts)])
            for i in range(1, 5)
        )
        return Samples(np.concatenate([copy[0] for copy in copies]), *rest)


class Step(NamedTuple):
    """The samples of one global batch."""

    samples: Samples
    sample_ids: IntArray
    epoch: int
    number: int
    """Within the epoch."""


@dataclass(frozen=True)
class Collator:
    """Makes batches of ``num_rows`` rows from sequences of a global batch."""

    objective: Objective
    max_len: int
    num_items: int
    seed: int
    num_rows: int
    last_only: bool = False
    """Whether a sample is scored at its last position alone."""

    def __post_init__(self) -> None:
        if self.last_only and self.objective.cloze_ratio is not None:
            raise ConfigError(
                "data.samples=prefixes with a backbone that predicts masked items (bert4rec).",
                rule="A prefix is scored at its last position, this backbone at the masked ones.",
                remedy="Give data.samples=histories, or another backbone.name.",
            )

    def counts(self, step: Step) -> tuple[int, int]:
        """Scored and real positions of the global batch."""
        lengths = step.samples.lengths
        if self.objective.cloze_ratio is None:
            inputs = int(lengths.sum()) - len(lengths)
            return len(lengths) if self.last_only else inputs, inputs
        return int(self._cloze(step, np.arange(len(lengths)), lengths).sum()), int(lengths.sum())

    def batch(self, step: Step, chosen: IntArray) -> SequenceBatch:
        """The batch of the ``chosen`` samples."""
        samples = step.samples.take(chosen)
        if self.objective.cloze_ratio is None:
            history, targets = next_items(samples, self.num_rows)
            if self.last_only:
                targets[:, :-1][targets[:, 1:] != PADDING_IDX] = PADDING_IDX
        else:
            history, targets = self._masked(
                step,
                chosen,
                padded_rows(samples.items, samples.starts, samples.ends, self.num_rows),
            )
        ids = np.full(self.num_rows, -1, dtype=np.int64)
        ids[: len(chosen)] = step.sample_ids[chosen]
        shared = self._shared(step)
        return SequenceBatch(
            torch.from_numpy(history),
            torch.from_numpy(targets),
            torch.from_numpy(ids),
            self._negatives(step, samples, step.sample_ids[chosen], history.shape[1]),
            *shared,
            self._views(step, chosen, history),
        ).counted()

    def _draws(self, step: Step, chosen: IntArray) -> Draws:
        return Draws(self.seed, step.epoch, step.sample_ids[chosen])

    def _cloze(self, step: Step, chosen: IntArray, lengths: IntArray) -> npt.NDArray[np.bool_]:
        assert self.objective.cloze_ratio is not None
        width = int(lengths.max(initial=1))
        return cloze_mask(self._draws(step, chosen), lengths, width, self.objective.cloze_ratio)

    def _masked(self, step: Step, chosen: IntArray, recent: IntArray) -> tuple[IntArray, IntArray]:
        masked = np.zeros(recent.shape, dtype=np.bool_)
        chosen_mask = self._cloze(step, chosen, (recent[: len(chosen)] != PADDING_IDX).sum(axis=1))
        masked[: len(chosen), : chosen_mask.shape[1]] = chosen_mask
        return np.where(masked, self.num_items + 1, recent), np.where(masked, recent, PADDING_IDX)

    def _negatives(
        self, step: Step, samples: Samples, sample_ids: IntArray, length: int
    ) -> torch.Tensor | None:
        count = self.objective.num_negatives
        if not count:
            return None
        drawn = np.zeros((self.num_rows, length, count), dtype=np.int64)
        if len(sample_ids):
            rule = self.objective.negative_rule
            starts, ends = rule.excluded(*samples[1:])
            excluded = [samples.items[a:b] for a, b in zip(starts, ends)]
            keys = {"num_items": self.num_items, "seed": self.seed, "epoch": step.epoch}
            drawn[: len(sample_ids)] = sample_negatives(
                excluded,
                sample_ids,
                length,
                count,
                **keys,
                rule=rule,
            )
        return torch.from_numpy(drawn)

    def _shared(self, step: Step) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        count = self.objective.num_shared_negatives
        if not count:
            return None, None
        keys = {
            "num_items": self.num_items,
            "seed": self.seed,
            "epoch": step.epoch,
            "step": step.number,
        }
        ids, log_probability = sample_shared(count, self.objective.proposal, **keys)
        return torch.from_numpy(ids), torch.from_numpy(log_probability.astype(np.float32))

    def _views(self, step: Step, chosen: IntArray, history: IntArray) -> torch.Tensor | None:
        if self.objective.views is None:
            return None
        views = np.full((self.num_rows, 2, history.shape[1]), PADDING_IDX, dtype=np.int64)
        draws = self._draws(step, chosen)
        views[: len(chosen)] = augmented_views(
            draws, history[: len(chosen)], self.objective.views, self.num_items + 1
        )
        return torch.from_numpy(views)


def next_items(samples: Samples, num_rows: int) -> tuple[IntArray, IntArray]:
    """Histories and, at each position, the item that follows; [num_rows, longest], padded
    behind.
    """
    sizes = samples.lengths - 1
    columns = np.arange(max(1, int(sizes.max(initial=0))) + 1)
    indices = runs(samples.items, samples.starts, len(columns))
    present = columns[:-1] < sizes[:, None]
    history, targets = np.zeros((2, num_rows, len(columns) - 1), dtype=np.int64)
    np.multiply(indices[:, :-1], present, out=history[: len(sizes)])
    np.multiply(indices[:, 1:], present, out=targets[: len(sizes)])
    return history, targets


def padded_rows(
    items: npt.NDArray[np.integer], starts: IntArray, ends: IntArray, num_rows: int
) -> IntArray:
    """Runs of ``items`` as rows, padded behind.

    Returns:
        [num_rows, longest run, at least 2] item ids; rows beyond the runs are padding.
    """
    sizes = ends - starts
    columns = np.arange(max(2, int(sizes.max(initial=0))))
    rows = np.full((num_rows, len(columns)), PADDING_IDX, dtype=np.int64)
    np.multiply(runs(items, starts, len(columns)), columns < sizes[:, None], out=rows[: len(sizes)])
    return rows


def runs(items: npt.NDArray[np.integer], starts: IntArray, width: int) -> npt.NDArray[np.integer]:
    """[n, width] what lies in ``items`` from each of ``starts`` on; behind the last item, zeros."""
    if len(starts) and starts.max() + width > len(items):
        items = np.concatenate([items, np.zeros(width, items.dtype)])
    # Rows that overlap in memory: whole runs are copied, five times as fast as item by item.
    rows: npt.NDArray[np.integer] = np.lib.stride_tricks.as_strided(
        items, (max(0, len(items) - width + 1), width), items.strides * 2, writeable=False
    )
    return rows[starts]
