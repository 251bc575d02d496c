"""D18: negatives outside a sample's inputs, that differ from each other.

The last target, which is no input, can be among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mltfr_dist.config import PublishedConfig
from mltfr_dist.data.shards.packed import IntArray
from mltfr_dist.data.stream.negatives import UNSEEN, BoolArray, NegativeRule


@dataclass(frozen=True)
class OutsideInputs(NegativeRule):
    """Negatives of a sample lie outside its inputs, and are drawn without replacement."""

    stated: ClassVar[str] = (
        "A negative must lie outside the inputs of a sample, and its negatives must differ."
    )

    def excluded(
        self, starts: IntArray, ends: IntArray, history_starts: IntArray, history_ends: IntArray
    ) -> tuple[IntArray, IntArray]:
        """The inputs: all but the last item."""
        return starts, ends - 1

    def wanted(self, sizes: IntArray, num_positions: int) -> BoolArray:
        """[B, L], the positions that have an input."""
        mask: BoolArray = np.arange(num_positions) < sizes[:, None]
        return mask

    def refused(self, negatives: IntArray) -> BoolArray:
        """[B, P] whether an earlier draw of the row gave the same."""
        order = np.argsort(negatives, axis=1, kind="stable")
        in_order = np.take_along_axis(negatives, order, axis=1)
        repeats = np.zeros(negatives.shape, dtype=bool)
        np.put_along_axis(repeats, order[:, 1:], in_order[:, 1:] == in_order[:, :-1], axis=1)
        return repeats


def published_negatives(published: PublishedConfig) -> NegativeRule:
    """The rule of a run."""
    return OutsideInputs() if published.negatives_outside_inputs else UNSEEN
