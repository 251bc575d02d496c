"""Masks and augmented views of histories, by counter-based random numbers.

Each draw is a hash of (seed, epoch, sample, position), so a sequence gets the same ones at any
world size, in any batch and after any resume. Shapes: B sequences, L positions.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mltfr_dist.data.batch import PADDING_IDX
from mltfr_dist.data.shards.packed import IntArray
from mltfr_dist.data.stream.negatives import hash_u64, unit_interval

BoolArray = npt.NDArray[np.bool_]
CLOZE, VIEW = (1 << 62) + 1, (1 << 62) + 2
"""Keys that keep these draws apart from those of negatives."""


class Draws(NamedTuple):
    """What keys the random numbers of some sequences."""

    seed: int
    epoch: int
    sample_ids: IntArray
    """[B]."""


class ViewRatios(NamedTuple):
    """How strongly a view is augmented: shares of a history's length."""

    crop: float
    mask: float
    reorder: float


def cloze_mask(draws: Draws, lengths: IntArray, width: int, ratio: float) -> BoolArray:
    """Which positions are masked: each with probability ``ratio``, and the last one where none
    would be.

    Args:
        draws: Keys of the B sequences.
        lengths: [B] real positions of each.
        width: L.
        ratio: Probability.

    Returns:
        [B, L] bool, False at padding.
    """
    columns = np.arange(width, dtype=np.uint64)
    words = hash_u64(
        draws.seed, draws.epoch, CLOZE, draws.sample_ids.astype(np.uint64)[:, None], columns
    )
    chosen: BoolArray = (unit_interval(words) < ratio) & (np.arange(width) < lengths[:, None])
    last: BoolArray = np.arange(width) == lengths[:, None] - 1
    return chosen | (last & ~chosen.any(axis=1, keepdims=True))


def augmented_views(draws: Draws, item_ids: IntArray, ratios: ViewRatios, mask_id: int) -> IntArray:
    """Two views of each history (Xie et al. 2022): each by cropping, masking or reordering, drawn
    evenly.

    Args:
        draws: Keys of the B histories.
        item_ids: [B, L], padded behind.
        ratios: Strengths.
        mask_id: Id that stands for a masked item.

    Returns:
        [B, 2, L], padded behind. A history is never emptied.
    """
    rows = draws.sample_ids.astype(np.uint64)[:, None]
    lengths = (item_ids != PADDING_IDX).sum(axis=1, keepdims=True)  # [B, 1]
    columns = np.arange(item_ids.shape[1])
    views = []
    for number in range(2):
        key = (draws.seed, draws.epoch, VIEW, rows, number)
        kind = hash_u64(*key, 0) % np.uint64(3)  # [B, 1]
        start_words = hash_u64(*key, 1)
        words = hash_u64(*key, 2, columns.astype(np.uint64))  # [B, L]
        view = np.where(kind == 0, _crop(item_ids, lengths, start_words, ratios.crop), item_ids)
        view = np.where(kind == 1, _mask(item_ids, lengths, words, ratios.mask, mask_id), view)
        view = np.where(
            kind == 2, _reorder(item_ids, lengths, start_words, words, ratios.reorder), view
        )
        views.append(view)
    return np.stack(views, axis=1)


def _window(
    lengths: IntArray, start_words: npt.NDArray[np.uint64], ratio: float
) -> tuple[IntArray, IntArray]:
    """Start and size [B, 1] of a run of ``ratio`` of each history, at least one position (none of
    an empty row).
    """
    sizes = np.minimum(np.maximum(1, np.floor(ratio * lengths).astype(np.int64)), lengths)
    starts = (start_words % (lengths - sizes + 1).astype(np.uint64)).astype(np.int64)
    return starts, sizes


def _crop(
    item_ids: IntArray, lengths: IntArray, start_words: npt.NDArray[np.uint64], ratio: float
) -> IntArray:
    starts, sizes = _window(lengths, start_words, ratio)
    columns = np.arange(item_ids.shape[1])
    moved = np.take_along_axis(
        item_ids, np.minimum(starts + columns, item_ids.shape[1] - 1), axis=1
    )
    return np.where(columns < sizes, moved, PADDING_IDX)


def _mask(
    item_ids: IntArray, lengths: IntArray, words: npt.NDArray[np.uint64], ratio: float, mask_id: int
) -> IntArray:
    real = item_ids != PADDING_IDX
    order = np.argsort(
        np.where(real, words >> np.uint64(1), np.uint64(1 << 63)), axis=1, kind="stable"
    )
    ranks = np.argsort(order, axis=1, kind="stable")
    return np.where(real & (ranks < np.floor(ratio * lengths)), mask_id, item_ids)


def _reorder(
    item_ids: IntArray,
    lengths: IntArray,
    start_words: npt.NDArray[np.uint64],
    words: npt.NDArray[np.uint64],
    ratio: float,
) -> IntArray:
    starts, sizes = _window(lengths, start_words, ratio)
    columns = np.arange(item_ids.shape[1])
    inside = (columns >= starts) & (columns < starts + sizes)
    order = np.lexsort((np.where(inside, words, 0), np.where(inside, starts, columns)), axis=-1)
    return np.take_along_axis(item_ids, order, axis=1)
