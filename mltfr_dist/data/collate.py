"""Sequences of one global batch to one rank's batches: what is predicted, at which positions, against what.

Everything that is drawn here is a function of (seed, epoch, step or sample, position): the same at any division.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mltfr_dist.data.augment import Draws, ViewRatios, augmented_views, cloze_mask
from mltfr_dist.data.batch import PADDING_IDX, SequenceBatch
from mltfr_dist.data.negatives import Proposal, sample_negatives, sample_shared
from mltfr_dist.data.shards import PackedSequences

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Objective:
    """What a batch holds for the loss."""

    num_negatives: int = 0
    """Negatives of each position."""
    unseen_negatives: bool = True
    """Whether they lie outside the user's history; if not, they may be any id, padding included (published)."""
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


class Step(NamedTuple):
    """The sequences of one global batch."""

    sequences: PackedSequences
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

    def counts(self, step: Step) -> tuple[int, int]:
        """Scored and real positions of the global batch."""
        kept = np.minimum(np.diff(step.sequences.offsets), self.max_len + 1)
        if self.objective.cloze_ratio is None:
            return int((kept - 1).sum()), int((kept - 1).sum())
        return int(self._cloze(step, np.arange(len(kept)), kept).sum()), int(kept.sum())

    def batch(self, step: Step, chosen: IntArray) -> SequenceBatch:
        """The batch of the ``chosen`` sequences."""
        recent = last_items(step.sequences, chosen, self.max_len + 1, self.num_rows)  # [B, <= max_len + 1]
        if self.objective.cloze_ratio is None:
            history, targets = recent[:, :-1].copy(), recent[:, 1:].copy()
            history[targets == PADDING_IDX] = PADDING_IDX  # the last item is only ever a target
        else:
            history, targets = self._masked(step, chosen, recent)
        ids = np.full(self.num_rows, -1, dtype=np.int64)
        ids[: len(chosen)] = step.sample_ids[chosen]
        shared = self._shared(step)
        return SequenceBatch(
            torch.from_numpy(history),
            torch.from_numpy(targets),
            torch.from_numpy(ids),
            self._negatives(step, chosen, history.shape[1]),
            *shared,
            self._views(step, chosen, history),
        )

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

    def _negatives(self, step: Step, chosen: IntArray, length: int) -> torch.Tensor | None:
        count = self.objective.num_negatives
        if not count:
            return None
        drawn = np.zeros((self.num_rows, length, count), dtype=np.int64)
        if len(chosen):
            histories = [step.sequences[int(i)] for i in chosen]
            keys = {"num_items": self.num_items, "seed": self.seed, "epoch": step.epoch}
            drawn[: len(chosen)] = sample_negatives(
                histories, step.sample_ids[chosen], length, count, **keys, unseen=self.objective.unseen_negatives
            )
        return torch.from_numpy(drawn)

    def _shared(self, step: Step) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        count = self.objective.num_shared_negatives
        if not count:
            return None, None
        keys = {"num_items": self.num_items, "seed": self.seed, "epoch": step.epoch, "step": step.number}
        ids, log_probability = sample_shared(count, self.objective.proposal, **keys)
        return torch.from_numpy(ids), torch.from_numpy(log_probability.astype(np.float32))

    def _views(self, step: Step, chosen: IntArray, history: IntArray) -> torch.Tensor | None:
        if self.objective.views is None:
            return None
        views = np.full((self.num_rows, 2, history.shape[1]), PADDING_IDX, dtype=np.int64)
        draws = self._draws(step, chosen)
        views[: len(chosen)] = augmented_views(draws, history[: len(chosen)], self.objective.views, self.num_items + 1)
        return torch.from_numpy(views)


def last_items(sequences: PackedSequences, chosen: IntArray, width: int, num_rows: int) -> IntArray:
    """The last items of the ``chosen`` sequences, oldest first, padded behind.

    Returns:
        [num_rows, W] item ids with W = min(width, longest chosen), at least 2; rows beyond the chosen are padding.
    """
    ends = sequences.offsets[1:][chosen]
    kept = np.minimum(ends - sequences.offsets[:-1][chosen], width)
    columns = np.arange(max(2, int(kept.max(initial=0))))
    present = columns < kept[:, None]
    places = np.where(present, (ends - kept)[:, None] + columns, 0)
    result = np.full((num_rows, len(columns)), PADDING_IDX, dtype=np.int64)
    result[: len(chosen)] = np.where(present, sequences.items[places], PADDING_IDX)
    return result
