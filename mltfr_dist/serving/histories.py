"""Histories in any form: lists, NumPy, pandas, polars and Arrow, to numbers of items.

None of pandas and polars is imported: tables hand out their columns by Arrow's C stream protocol.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, Literal, get_args

import numpy as np

from mltfr_dist.errors import ConfigError, DataError
from mltfr_dist.serving.items import ItemMap, as_list, as_texts

HISTORY, USER = "history", "user_id"
"""Columns of a table of histories; the second may be missing."""

Unknown = Literal["refuse", "drop"]
"""What becomes of ids that the model does not know."""


@dataclass(frozen=True)
class Histories:
    """Histories as numbers of items."""

    numbers: list[list[int]]
    """Oldest first."""
    users: list[object] | None
    """Whose they are, where a table says so."""
    dropped: int
    """Unknown ids that were left out."""

    def __len__(self) -> int:
        return len(self.numbers)


def encode(given: object, items: ItemMap, unknown: Unknown = "refuse") -> Histories:
    """Histories of raw ids to numbers.

    Args:
        given: A list of lists, a NumPy array [B, L] or an array of arrays, a pandas, polars or
            Arrow column of lists, a table with a column ``history`` of lists (and perhaps
            ``user_id``), or :class:`Histories`.
        items: Of the model.
        unknown: "refuse" or "drop"; dropped ids are counted.

    Raises:
        ConfigError: Another ``unknown``.
        DataError: None of these forms, no histories at all, or an id that is not known.
    """
    check_choice("unknown", unknown, get_args(Unknown))
    if isinstance(given, Histories):
        return given
    users, rows = _rows(given)
    if not rows:
        raise DataError("There are no histories.", remedy="Give at least one.")
    raw_ids = []
    for index, row in enumerate(rows):
        if isinstance(row, Set):
            raise DataError(
                f"History {index} is a set.",
                rule="A history has an order, oldest first.",
                remedy="Give a list.",
            )
        raw_ids.append(as_texts(row))
    together = iter(items.find(list(chain.from_iterable(raw_ids))))
    numbers, dropped = [], 0
    for index, texts in enumerate(raw_ids):
        item_ids = list(islice(together, len(texts)))
        if not all(item_ids) and unknown == "refuse":
            where = f" in history {index} of {len(rows)}" if len(rows) > 1 else ""
            raise items.unknown(texts, item_ids, where, "unknown=drop")
        known = [number for number in item_ids if number]
        dropped += len(item_ids) - len(known)
        numbers.append(known)
    return Histories(numbers, users, dropped)


def held(given: Any) -> Any:
    """What ``given`` holds, where it can be gone through only once."""
    return list(given) if isinstance(given, Iterator) else given


def is_single(given: object) -> bool:
    """Whether ``given`` is one history, and no list of several.

    An empty list is an empty history.
    """
    if isinstance(given, Histories) or is_table(given):
        return False
    values = as_list(given)
    return not values or isinstance(values[0], str | int | float | np.integer | None)


def is_table(given: object) -> bool:
    """Whether it has named columns and hands them out."""
    return hasattr(given, "__arrow_c_stream__") and (
        hasattr(given, "columns") or hasattr(given, "schema")
    )


def _rows(given: Any) -> tuple[list[object] | None, list[object]]:
    """Users, where they are told, and their histories."""
    if not is_table(given):
        return None, as_list(given)
    import pyarrow as pa

    table = pa.RecordBatchReader.from_stream(given).read_all()
    if HISTORY not in table.column_names:
        raise DataError(
            f"The table has the columns {', '.join(table.column_names)}.",
            rule=f"A table of histories has a column `{HISTORY}` of lists of item ids, oldest "
            f"first, and perhaps `{USER}`.",
            remedy="Rename the column, or group the interactions by user first.",
        )
    users = table[USER].to_pylist() if USER in table.column_names else None
    return users, table[HISTORY].to_pylist()


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Whether an option has one of its values.

    Raises:
        ConfigError: It has not.
    """
    if value not in choices:
        raise ConfigError(
            f"{name} is {value!r}.",
            rule=f"{name} is {' or '.join(choices)}.",
            remedy="Give one of these.",
        )
