"""Batches: typed, immutable, and tuples, so that DeepSpeed's hooks see the tensors inside.

Shapes: B sequences, L positions (the longest history of the batch), N negatives of a position, S
shared negatives. Sequences start at column 0 and are padded behind their end, so that a causal
model never sees padding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

PADDING_IDX = 0
"""Item id of an empty position. Real items are ``1..num_items``."""


class Counts(NamedTuple):
    """What the loader knows of a batch, so that nobody has to ask a device for it and wait."""

    lengths: tuple[int, ...]
    """Real positions of each row [B]."""
    num_targets: int
    """Positions that are scored."""
    view_lengths: tuple[int, ...] | None = None
    """Real positions of each view [2 B], where there are views."""


class Room(NamedTuple):
    """Places that a batch's real positions and targets are given, more than they need, so that few
    shapes serve all batches. What is computed at the places beyond counts for nothing.
    """

    positions: int
    """More than there are real positions."""
    targets: int
    """At least as many as are scored."""

    @classmethod
    def for_counts(cls, counts: Counts) -> Room:
        """The next of a few sizes."""
        return cls(_next_size(sum(counts.lengths) + 1), _next_size(counts.num_targets))


def _next_size(count: int) -> int:
    """``count`` or up to an eighth more: a multiple of 16, or of a sixteenth to an eighth of it."""
    step = max(16, 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step


class SequenceBatch(NamedTuple):
    """Histories to train on, with what the model is to predict at which positions."""

    item_ids: Tensor
    """[B, L] int64, oldest first. A mask, where there is one, has the id num_items + 1."""
    target_ids: Tensor
    """[B, L] int64, the item to be predicted at each position (the next one, or the one that is
    masked there); ``PADDING_IDX`` where nothing is."""
    sample_ids: Tensor
    """[B] int64, position of the sequence in the epoch's global order: keys its random numbers at
    any world size.
    """
    negative_ids: Tensor | None = None
    """[B, L, N] int64, sampled items that the user has not interacted with, where the loss needs
    them.
    """
    shared_negative_ids: Tensor | None = None
    """[S] int64, items drawn for all positions of the *global* batch, where the loss needs them."""
    shared_log_probability: Tensor | None = None
    """[S] logarithm of the probability with which each of them is drawn."""
    view_ids: Tensor | None = None
    """[B, 2, L] int64, two augmented views of each history, where the loss contrasts them."""
    room: Room | None = None
    """Where there is room for more, of :meth:`in_room`; ``counts`` are None then."""
    counts: Counts | None = None
    """Of the tensors above; None: not known, and looked up where they are needed."""

    @property
    def num_targets(self) -> int:
        """Positions that are scored."""
        if self.counts is not None:
            return self.counts.num_targets
        return int((self.target_ids != PADDING_IDX).sum())

    @property
    def lengths(self) -> tuple[int, ...] | None:
        """Real positions of each row, where they are known."""
        return None if self.counts is None else self.counts.lengths

    def counted(self) -> SequenceBatch:
        """The same batch with its counts; of tensors on the CPU."""
        views = self.view_ids
        return self._replace(
            counts=Counts(
                tuple(lengths(self.item_ids).tolist()),
                int((self.target_ids != PADDING_IDX).sum()),
                None if views is None else tuple(lengths(views.flatten(0, 1)).tolist()),
            )
        )

    def in_room(self, max_len: int) -> SequenceBatch:
        """The same batch in a shape that many others have, too: as wide as a multiple of 16, and
        with an empty row behind, where the places beyond its positions find padding.

        Args:
            max_len: Width at most.
        """
        assert self.counts is not None
        wider = min(max_len, -(-self.item_ids.shape[1] // 16) * 16) - self.item_ids.shape[1]
        negatives = self.negative_ids
        return self._replace(
            item_ids=F.pad(self.item_ids, (0, wider, 0, 1), value=PADDING_IDX),
            target_ids=F.pad(self.target_ids, (0, wider, 0, 1), value=PADDING_IDX),
            sample_ids=F.pad(self.sample_ids, (0, 1), value=-1),
            negative_ids=None if negatives is None else F.pad(negatives, (0, 0, 0, wider, 0, 1)),
            counts=None,
            room=Room.for_counts(self.counts),
        )

    @property
    def sampled(self) -> tuple[Tensor | None, Tensor | None]:
        """Ids of the negatives, where there are any."""
        return self.negative_ids, self.shared_negative_ids

    def to(self, device: torch.device) -> SequenceBatch:
        """The same batch on ``device``."""
        moved = (sent(t, device) if isinstance(t, Tensor) else t for t in self)
        return SequenceBatch(*moved)  # type: ignore[arg-type]


class RankingBatch(NamedTuple):
    """Histories whose next items are to be ranked among all items: B histories, T targets."""

    item_ids: Tensor
    """[B, L] int64, oldest first."""
    target_ids: Tensor
    """[T] int64, true next items, one of each row unless ``target_rows`` says whose they are;
    ``PADDING_IDX`` marks a row that only fills the batch and counts for nothing.
    """
    seen_rows: Tensor
    """[S] int64, ascending, row of each (user, item) pair of the *full* histories."""
    seen_items: Tensor
    """[S] int64, item of each of those pairs."""
    numbers: Tensor | None = None
    """[B] int64, index of each row's user in the split, where it is one of a split."""
    target_rows: Tensor | None = None
    """[T] int64, ascending, row of each target's history; None: row i has target i."""
    seen_targets: Tensor | None = None
    """[S] bool, whether a pair's item is one of the user's targets, too; with ``target_rows``."""

    def of_targets(self, of_rows: Tensor) -> Tensor:
        """What rows have [B, ...] -> what their targets have [T, ...]."""
        return of_rows if self.target_rows is None else of_rows[self.target_rows]

    def to(self, device: torch.device) -> RankingBatch:
        """The same batch on ``device``."""
        moved = (sent(t, device) if isinstance(t, Tensor) else t for t in self)
        return RankingBatch(*moved)  # type: ignore[arg-type]


def sent(t: Tensor, device: torch.device) -> Tensor:
    """``t`` on ``device``; on its way to a GPU from pinned memory, which nobody waits for."""
    if device.type == "cuda" and t.device.type == "cpu":
        t = t.pin_memory()
    return t.to(device, non_blocking=True)


def lengths(item_ids: Tensor) -> Tensor:
    """[B] number of ids of each row [B, L] that are no padding."""
    return (item_ids != PADDING_IDX).sum(dim=1)
