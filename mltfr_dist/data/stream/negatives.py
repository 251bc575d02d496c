"""Negative sampling by counter-based random numbers: of each position, or shared by a whole global
batch.

Each draw is a hash of (seed, epoch, sample, position, draw, attempt), or of (seed, epoch, step,
draw), so a sequence gets the same negatives at any world size, in any batch and after any resume.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from mltfr_dist.data.shards.packed import IntArray
from mltfr_dist.errors import DataError

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]
Proposal = Literal["uniform", "log_uniform"]
MAX_ATTEMPTS = 100
SHARED = 1 << 62
"""Key that keeps shared draws apart from those of positions."""


def hash_u64(*keys: npt.NDArray[np.uint64] | int) -> npt.NDArray[np.uint64]:
    """Mix broadcastable integer ``keys`` into uniform 64-bit words (the SplitMix64 finaliser,
    Steele et al. 2014).
    """
    state = np.asarray(0x9E3779B97F4A7C15, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            word = np.asarray(key, dtype=np.uint64)
            state = (state ^ word) * np.uint64(0xBF58476D1CE4E5B9) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def unit_interval(words: npt.NDArray[np.uint64]) -> FloatArray:
    """Uniform words to uniform numbers in [0, 1)."""
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def log_probability(item_ids: IntArray, proposal: Proposal, num_items: int) -> FloatArray:
    """Logarithm of the probability of each item under ``proposal``.

    uniform: 1 / num_items. log_uniform: log((i + 1) / i) / log(num_items + 1), near Zipf's law, as
    ids go by popularity in the training split, the most popular first.
    """
    if proposal == "uniform":
        return np.full(item_ids.shape, -np.log(num_items))
    logarithms: FloatArray = np.log(np.log1p(1.0 / item_ids) / np.log(num_items + 1.0))
    return logarithms


def sample_shared(
    count: int, proposal: Proposal, *, num_items: int, seed: int, epoch: int, step: int
) -> tuple[IntArray, FloatArray]:
    """Draw ``count`` items, with replacement, for all positions of one global batch.

    Returns:
        Item ids [count], and the logarithm of each one's probability [count].
    """
    uniform = unit_interval(hash_u64(seed, epoch, SHARED, step, np.arange(count, dtype=np.uint64)))
    if proposal == "uniform":
        ids = (uniform * num_items).astype(np.int64) + 1
    else:
        ids = np.exp(uniform * np.log(num_items + 1.0)).astype(np.int64).clip(1, num_items)
    return ids, log_probability(ids, proposal, num_items)


@dataclass(frozen=True)
class NegativeRule:
    """Which items a sample's negatives may be: those outside its user's whole history."""

    stated: ClassVar[str] = "A negative must lie outside the user's history."
    """In words, for messages."""

    def excluded(
        self, starts: IntArray, ends: IntArray, history_starts: IntArray, history_ends: IntArray
    ) -> tuple[IntArray, IntArray]:
        """Where, among all items, those that are not drawn begin and end, of each sample [n].

        Args:
            starts: Where the sample itself begins.
            ends: Where it ends; its last item is only ever a target.
            history_starts: Where its user's history begins.
            history_ends: Where that ends.
        """
        return history_starts, history_ends

    def wanted(self, sizes: IntArray, num_positions: int) -> BoolArray:
        """[B, L] which positions are drawn for, of samples with [B] ``sizes`` excluded items; 0
        stands at the others.
        """
        return np.ones((len(sizes), num_positions), dtype=bool)

    def refused(self, negatives: IntArray) -> BoolArray:
        """[B, L * N] which draws are drawn again, beside those that are excluded."""
        return np.zeros(negatives.shape, dtype=bool)


UNSEEN = NegativeRule()


def sample_negatives(
    excluded: list[npt.NDArray[np.integer]],
    sample_ids: IntArray,
    length: int,
    num_negatives: int,
    *,
    num_items: int,
    seed: int,
    epoch: int,
    rule: NegativeRule = UNSEEN,
) -> IntArray:
    """Draw ``num_negatives`` items for every position of every sample.

    Args:
        excluded: B arrays of item ids that are not drawn, as ``rule`` says: each user's *full*
            training history.
        sample_ids: [B] key of each sample.
        length: L, positions to draw for.
        num_negatives: N, draws a position.
        num_items: Items are 1..num_items.
        seed: Seed of the run.
        epoch: Epoch, so that each one has new negatives.
        rule: What else is refused, and for which positions is drawn.

    Returns:
        [B, L, N] item ids, none of them excluded in their row.

    Raises:
        DataError: (Nearly) every item is excluded, so that no negative can be found.
    """
    rows = sample_ids.astype(np.uint64)[:, None]
    columns = np.arange(length * num_negatives)[None]  # [1, L * N]
    sizes = np.array([len(items) for items in excluded])
    owners = np.repeat(np.arange(len(excluded)), sizes)
    taken = np.unique(owners * (num_items + 1) + np.concatenate(excluded).astype(np.int64))
    row_base = (np.arange(len(excluded)) * (num_items + 1))[:, None]
    wanted = np.repeat(rule.wanted(sizes, length), num_negatives, axis=1)  # [B, L * N]
    negatives, pending = np.zeros(wanted.shape, dtype=np.int64), wanted
    for attempt in range(MAX_ATTEMPTS):
        words = hash_u64(seed, epoch, rows, columns.astype(np.uint64), attempt)
        draws = (words % np.uint64(num_items)).astype(np.int64) + 1
        negatives = np.where(pending, draws, negatives)
        pending = np.isin(negatives + row_base, taken) & wanted
        pending |= rule.refused(negatives) & wanted
        if not pending.any():
            return negatives.reshape(len(excluded), length, num_negatives)
    crowded = int(np.argmax(pending.any(axis=1)))
    raise DataError(
        f"No negative item was found in {MAX_ATTEMPTS} draws for a history of "
        f"{len(excluded[crowded])} of {num_items} items.",
        rule=rule.stated,
        remedy="Use loss.name=cross_entropy, or prepare with a greater `--item-core`, so that "
        "histories do not hold nearly every item.",
    )
