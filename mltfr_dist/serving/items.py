"""The items of a model: raw ids, numbers, titles, popularity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from mltfr_dist.data.batch import PADDING_IDX
from mltfr_dist.errors import DataError
from mltfr_dist.schema import or_nearest
from mltfr_dist.serving.texts import Lookup, Texts

ECHOED_ITEMS = 10
"""Unknown ids that an error names."""
NEAREST = 100_000
"""Most popular items among which the nearest to an unknown id is sought."""

WRITTEN = 1 << 20
"""Items that are read or written together."""
TYPES: dict[str, pa.DataType] = {
    "item_index": pa.int64(),
    "item_id": pa.string(),
    "title": pa.string(),
    "count": pa.int64(),
}

ItemId = str | int
"""A raw item id; a whole number stands for its digits."""


@dataclass(frozen=True)
class ItemMap:
    """Raw ids and titles of items 1..num_items; index 0 is padding.

    Memory: the bytes of ids and titles, 4 a text, 8 a count; from the first id that is looked up,
    12 an item more.
    """

    ids: Texts[str]
    titles: Texts[str | None]
    listed_in: str
    """File that lists the ids, for messages."""
    counts: npt.NDArray[np.int64]
    """[num_items + 1] interactions of each item in the data."""

    @classmethod
    def of(cls, file: pq.ParquetFile, listed_in: str) -> ItemMap:
        """The items of a file as :meth:`write` writes it, read some at a time."""
        counts = np.zeros(file.metadata.num_rows + 1, dtype=np.int64)
        ids: list[Any] = [pa.array([""])]
        titles: list[Any] = [pa.array([None], pa.string())]
        for batch in file.iter_batches(WRITTEN):
            numbers = batch["item_index"].to_numpy()
            assert numbers[0] == sum(map(len, ids)), "items go by their numbers"
            counts[numbers] = batch["count"].to_numpy()
            ids.append(batch["item_id"])
            titles.append(batch["title"])
        columns = (pa.chunked_array(chunks, pa.string()) for chunks in (ids, titles))
        return cls(Texts(next(columns)), Texts(next(columns)), listed_in, counts)

    def write(self, path: Path) -> None:
        """Write a file with the columns of `items.parquet`, some items at a time."""
        schema = pa.schema(TYPES)
        with pq.ParquetWriter(path, schema) as file:
            for start in range(1, len(self.ids), WRITTEN):
                stop = min(start + WRITTEN, len(self.ids))
                columns = {
                    "item_index": np.arange(start, stop),
                    "item_id": self.ids.column.slice(start, WRITTEN),
                    "title": self.titles.column.slice(start, WRITTEN),
                    "count": self.counts[start:stop],
                }
                file.write_table(pa.table(columns, schema))

    @property
    def num_items(self) -> int:
        """Items, padding not counted."""
        return len(self.ids) - 1

    @cached_property
    def _lookup(self) -> Lookup:
        return Lookup(self.ids)

    def find(self, raw_ids: Sequence[str]) -> list[int]:
        """Number of each raw id, 1..num_items; 0 where it is not known."""
        numbers: list[int] = self._lookup.find(raw_ids).clip(min=PADDING_IDX).tolist()
        return numbers

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
        numbers = self.find(raw_ids)
        if not all(numbers):
            raise self.unknown(raw_ids, numbers)
        return numbers

    def unknown(
        self, raw_ids: Sequence[str], numbers: Sequence[int], where: str = "", drop: str = ""
    ) -> DataError:
        """The error for ids that are not known.

        Args:
            raw_ids: Some ids.
            numbers: What :meth:`find` gave for them, at least one 0.
            where: Which of several histories holds them.
            drop: What leaves them out, where anything does.
        """
        or_else = f"; {drop} leaves them out and counts them." if drop else "."
        raw_ids = [raw for raw, number in zip(raw_ids, numbers, strict=True) if not number]
        more = len(raw_ids) - ECHOED_ITEMS
        return DataError(
            f"Unknown item id{'s' if len(raw_ids) > 1 else ''} "
            + ", ".join(raw_ids[:ECHOED_ITEMS])
            + f" and {more} more" * (more > 0)
            + where
            + f"{or_nearest(raw_ids[0], self.ids[1:NEAREST])}.",
            rule="Ids are those of the raw data that preparation kept "
            f"({self.listed_in} lists them).",
            remedy=f"Leave them out or correct them{or_else}",
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
    texts = []
    for raw in as_list(history):
        if isinstance(raw, bool) or not isinstance(raw, str | int | np.integer):
            raise DataError(
                f"The history holds {raw!r}, of type {type(raw).__name__}.",
                rule="An item id is a text or a whole number.",
                remedy="Give the ids as they stand in the raw data.",
            )
        texts.append(raw if isinstance(raw, str) else str(int(raw)))
    return texts
