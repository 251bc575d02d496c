"""The items of a model: raw ids, numbers, titles, popularity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from mltfr_dist.serving.texts import Kept, Lookup, T, Texts, reading

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
    """Raw ids and titles of items 1..num_items, read from their file by range; index 0 is padding.

    Memory: up to :data:`~mltfr_dist.serving.texts.HELD_BYTES` of ids and of titles; from the first
    id that is looked up, 8 bytes an item; from the first use of ``counts``, 8 more.
    """

    ids: Texts[str]
    titles: Texts[str | None]
    listed_in: str
    """File that lists the ids, for messages."""
    read_counts: Callable[[], npt.NDArray[np.int64]]
    """Gives ``counts``."""

    @classmethod
    def of(cls, file: pq.ParquetFile, listed_in: str) -> ItemMap:
        """The items of a file as :meth:`write` writes it, which stays open."""
        lengths = [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)]

        def read(group: int, column: str) -> Any:
            try:
                with reading:
                    return file.read_row_group(group, [column])[column].combine_chunks()
            except (OSError, pa.ArrowException) as error:
                raise DataError(
                    f"{listed_in} cannot be read any more: {error}.",
                    rule="The file is read while its items are used.",
                    remedy="Restore it, and start again.",
                ) from None

        def texts(column: str, first: T) -> Texts[T]:
            padding = pa.array([first], pa.string())
            kept = Kept(lambda chunk: read(chunk - 1, column) if chunk else padding)
            return Texts([1, *lengths], kept)

        def counts() -> npt.NDArray[np.int64]:
            counts = np.zeros(1 + sum(lengths), dtype=np.int64)
            for group in range(len(lengths)):
                counts[read(group, "item_index").to_numpy()] = read(group, "count").to_numpy()
            return counts

        return cls(texts("item_id", ""), texts("title", None), listed_in, counts)

    def write(self, path: Path) -> None:
        """Write a file with the columns of `items.parquet`, some items at a time."""
        schema = pa.schema(TYPES)
        with pq.ParquetWriter(path, schema) as file:
            for start in range(1, len(self.ids), WRITTEN):
                stop = min(start + WRITTEN, len(self.ids))
                columns = {
                    "item_index": np.arange(start, stop),
                    "item_id": self.ids.between(start, stop),
                    "title": self.titles.between(start, stop),
                    "count": self.counts[start:stop],
                }
                file.write_table(pa.table(columns, schema))

    @cached_property
    def counts(self) -> npt.NDArray[np.int64]:
        """[num_items + 1] interactions of each item in the data."""
        return self.read_counts()

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

    def encode(self, history: Sequence[ItemId], what: str = "The history") -> list[int]:
        """Raw item ids to 1..num_items.

        Args:
            history: A list of ids.
            what: It is called so.

        Raises:
            DataError: No list of ids, an empty one, or an id that is not known.
        """
        raw_ids = as_texts(history)
        if not raw_ids:
            raise DataError(f"{what} is empty.", remedy="Give at least one item id.")
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
            rule="Item ids are given as a list, those of a history oldest first.",
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
