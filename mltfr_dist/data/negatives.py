"""Negative sampling: uniform over the items a user has not interacted with, by counter-based random numbers.

Each draw is a hash of (seed, epoch, sample, position, draw, attempt), so a sequence gets the same negatives at any
world size, in any batch and after any resume.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mltfr_dist.errors import DataError

IntArray = npt.NDArray[np.int64]
MAX_ATTEMPTS = 100


def hash_u64(*keys: npt.NDArray[np.uint64] | int) -> npt.NDArray[np.uint64]:
    """Mix broadcastable integer ``keys`` into uniform 64-bit words (the SplitMix64 finaliser, Steele et al. 2014)."""
    state = np.asarray(0x9E3779B97F4A7C15, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            word = np.asarray(key, dtype=np.uint64)
            state = (state ^ word) * np.uint64(0xBF58476D1CE4E5B9) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def sample_negatives(
    histories: list[npt.NDArray[np.integer]],
    sample_ids: IntArray,
    length: int,
    num_negatives: int,
    *,
    num_items: int,
    seed: int,
    epoch: int,
) -> IntArray:
    """Draw ``num_negatives`` items for every position of every history.

    Args:
        histories: B arrays of item ids, each user's *full* training history.
        sample_ids: [B] key of each history.
        length: L, positions to draw for.
        num_negatives: N, draws a position.
        num_items: Items are 1..num_items.
        seed: Seed of the run.
        epoch: Epoch, so that each one has new negatives.

    Returns:
        [B, L, N] item ids, none of them in the row's history.

    Raises:
        DataError: A history holds (nearly) every item, so that no negative can be found.
    """
    shape = (len(histories), length, num_negatives)
    rows = sample_ids.astype(np.uint64)[:, None, None]
    places = np.arange(length * num_negatives, dtype=np.uint64).reshape(1, length, num_negatives)
    history_rows = np.repeat(np.arange(len(histories)), [len(h) for h in histories])
    taken = np.unique(history_rows * (num_items + 1) + np.concatenate(histories).astype(np.int64))
    row_base = (np.arange(len(histories)) * (num_items + 1))[:, None, None]
    negatives = np.zeros(shape, dtype=np.int64)
    pending = np.ones(shape, dtype=bool)
    for attempt in range(MAX_ATTEMPTS):
        draws = (hash_u64(seed, epoch, rows, places, attempt) % np.uint64(num_items)).astype(np.int64) + 1
        negatives = np.where(pending, draws, negatives)
        pending = np.isin(negatives + row_base, taken)
        if not pending.any():
            return negatives
    crowded = int(np.argmax(pending.any(axis=(1, 2))))
    raise DataError(
        f"No negative item was found in {MAX_ATTEMPTS} draws for a history of {len(histories[crowded])} of {num_items} items.",
        rule="A negative must lie outside the user's history.",
        remedy="Use loss.name=cross_entropy, or raise item_core so that histories do not hold nearly every item.",
    )
