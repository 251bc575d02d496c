"""Slices of targets by their popularity and by the length of their user's history."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from mltfr_dist.data.shards.packed import IntArray
from mltfr_dist.statistics.resampling import Floats

WORDS = {
    "popularity": ("rare target", "middling target", "common target"),
    "history_length": ("short history", "middling history", "long history"),
}


def user_slices(
    slicing: dict[str, Floats], users: IntArray
) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Names and members [T] of the slices: cold targets, and thirds of the targets by popularity
    and of the users by history, as far as known; ``users`` [T] are the targets'.

    A third ends at a whole value, so that users of equal value are together; the name has the
    values that it spans.
    """
    one_row = np.unique(users, return_index=True)[1]  # of each user
    for name, words in WORDS.items():
        if name not in slicing:
            continue
        values, rest = slicing[name], np.ones(len(slicing[name]), bool)
        if name == "popularity" and not values.all():
            yield "cold target (not in training)", values == 0
            rest = values > 0
        if not rest.any():
            continue
        divided = values[rest] if name == "popularity" else values[one_row]
        ends = np.quantile(divided, (1 / 3, 2 / 3), method="higher")
        third = (values > ends[0]).astype(int) + (values > ends[1])
        for number, word in enumerate(words):
            members = rest & (third == number)
            if members.any():
                low, high = int(values[members].min()), int(values[members].max())
                yield f"{word} ({low}{f'..{high}' if high > low else ''})", members
