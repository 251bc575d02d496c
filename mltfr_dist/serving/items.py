"""The items of a model: raw ids, numbers, titles, popularity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from mltfr_dist.errors import DataError
from mltfr_dist.schema import or_nearest

ECHOED_ITEMS = 10
"""Unknown ids that an error names."""

ItemId = str | int
"""A raw item id; a whole number stands for its digits."""


@dataclass(frozen=True)
class ItemMap:
    """Raw ids and titles of items 1..num_items; index 0 is padding."""

    ids: list[str]
    titles: list[str | None]
    listed_in: str
    """File that lists the ids, for messages."""
    counts: npt.NDArray[np.int64] | None = None
    """[num_items + 1] interactions of each item in the data; None where they are not known."""

    @property
    def num_items(self) -> int:
        """Items, padding not counted."""
        return len(self.ids) - 1

    @cached_property
    def numbers(self) -> dict[str, int]:
        """Raw id to 1..num_items."""
        return {raw: index for index, raw in enumerate(self.ids) if index}

    def name(self, item: int) -> str:
        """Title where there is one, raw id otherwise."""
        return self.titles[item] or self.ids[item]

    def encode(self, history: Sequence[ItemId]) -> list[int]:
        """Raw item ids to 1..num_items.

        Raises:
            DataError: No history of ids, an empty one, or an id that is not known.
        """
        raw_ids = as_texts(history)
        if not raw_ids:
            raise DataError("The history is empty.", remedy="Give at least one item id.")
        numbers = self.known(raw_ids)
        if len(numbers) < len(raw_ids):
            raise self.unknown([raw for raw in raw_ids if raw not in self.numbers])
        return numbers

    def known(self, raw_ids: Sequence[str]) -> list[int]:
        """Numbers of the ids that are known; the others are left out."""
        numbers = self.numbers
        return [numbers[raw] for raw in raw_ids if raw in numbers]

    def unknown(self, raw_ids: Sequence[str], where: str = "") -> DataError:
        """The error for ids that are not known.

        Args:
            raw_ids: At least one.
            where: Which of several histories holds them.
        """
        more = len(raw_ids) - ECHOED_ITEMS
        return DataError(
            f"Unknown item id{'s' if len(raw_ids) > 1 else ''} "
            + ", ".join(raw_ids[:ECHOED_ITEMS])
            + f" and {more} more" * (more > 0)
            + where
            + f"{or_nearest(raw_ids[0], self.numbers)}.",
            rule="Ids are those of the raw data that preparation kept "
            f"({self.listed_in} lists them).",
            remedy="Leave them out or correct them; unknown=drop leaves them out and counts them.",
        )


def as_list(values: object) -> list[object]:
    """What a history, or a list of ids, holds.

    Raises:
        DataError: One text, a mapping, or nothing that can be gone through.
    """
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__iter__"):
        raise DataError(
            f"{values!r} is no list of ids.",
            rule="A history is a list of item ids, oldest first.",
            remedy="Put the ids into a list, as in ['50', '172'].",
        )
    for name in ("to_pylist", "tolist"):  # Arrow; NumPy
        if hasattr(values, name):
            return list(getattr(values, name)())
    return list(values)


def as_texts(history: object) -> list[str]:
    """Raw ids as texts.

    Raises:
        DataError: No list of ids, or something in it that is no id.
    """
    found = []
    for raw in as_list(history):
        if isinstance(raw, bool) or not isinstance(raw, str | int | np.integer):
            raise DataError(
                f"The history holds {raw!r}, of type {type(raw).__name__}.",
                rule="An item id is a text or a whole number.",
                remedy="Give the ids as they stand in the raw data.",
            )
        found.append(raw if isinstance(raw, str) else str(int(raw)))
    return found
