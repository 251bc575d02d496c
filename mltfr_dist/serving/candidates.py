"""Which items may be recommended after which history.

Shapes: B histories, b of them at a time, I items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from mltfr_dist.errors import DataError
from mltfr_dist.models.tiles import Pairs
from mltfr_dist.serving.histories import Histories, check_choice, held, is_single
from mltfr_dist.serving.items import ItemMap, as_list

Empty = Literal["refuse", "popular"]
"""What becomes of histories without an item."""


@dataclass(frozen=True)
class Candidates:
    """Rules for a set of histories."""

    items: ItemMap
    histories: Histories
    exclude: list[list[int]] | None
    """For all histories (one list), or for each; None: nothing."""
    allow: list[list[int]] | None
    filter_seen: bool

    @classmethod
    def of(
        cls,
        items: ItemMap,
        histories: Histories,
        exclude: Any,
        allow: Any,
        filter_seen: bool,
        empty: Empty,
    ) -> Candidates:
        """Check what is asked for.

        Raises:
            DataError: An empty history that is refused, unknown ids, or lists for another number of
                histories.
            ConfigError: ``empty`` is none of its values.
        """
        check_choice("empty", empty, get_args(Empty))
        if empty == "refuse":
            check_told(histories, "; empty=popular answers by popularity")
        count = len(histories)
        return cls(
            items,
            histories,
            _lists("exclude", exclude, items, count),
            _lists("allow", allow, items, count),
            filter_seen,
        )

    @property
    def fewest_allowed(self) -> int:
        """Candidates of the history that has fewest, seen and excluded items not counted."""
        if self.allow is None:
            return self.items.num_items
        return min(len(set(row)) for row in self.allow)

    def popularity(self) -> Tensor:
        """[I] fp32 counts of items 1..I."""
        return torch.from_numpy(self.items.counts).float()[1:]

    def alike(self, indices: Sequence[int]) -> list[list[int]]:
        """``indices`` of histories in parts of the same allowed items, empty ones by themselves."""
        if self.allow is not None and len(self.allow) > 1:
            return [[index] for index in indices]
        told = [index for index in indices if self.histories.numbers[index]]
        empty = [index for index in indices if not self.histories.numbers[index]]
        return [group for group in (told, empty) if group]

    def allowed(self, index: int) -> Tensor | None:
        """[n] ids of what alone the history at ``index`` may get, ascending; None: all items."""
        if self.allow is None:
            return None
        return torch.tensor(sorted(set(self.allow[index % len(self.allow)])))

    def left_out(self, indices: Sequence[int]) -> Pairs:
        """Seen and excluded items of the histories at ``indices``, whose rows go from 0."""
        rows: list[int] = []
        ids: list[int] = []
        for row, index in enumerate(indices):
            seen = self.histories.numbers[index] if self.filter_seen else ()
            more = () if self.exclude is None else self.exclude[index % len(self.exclude)]
            ids += [*seen, *more]
            rows += [row] * (len(seen) + len(more))
        return Pairs(*(torch.tensor(column, dtype=torch.int64) for column in (rows, ids)))


def _lists(name: str, given: Any, items: ItemMap, count: int) -> list[list[int]] | None:
    """Numbers of the ids of ``exclude`` or ``allow``, in one list or one a history."""
    if given is None:
        return None
    given = held(given)
    rows = [given] if is_single(given) else as_list(given)
    if len(rows) not in (1, count):
        raise DataError(
            f"{name} holds {len(rows)} lists for {count} histories.",
            rule=f"{name} is one list of ids for all histories, or one for each.",
            remedy="Give one of these.",
        )
    return [items.encode(row) if len(as_list(row)) else [] for row in rows]  # type: ignore[arg-type]


def check_told(histories: Histories, or_else: str = "") -> None:
    """Whether every history holds an item; ``or_else`` is what else can be done.

    Raises:
        DataError: One does not.
    """
    without = [index for index, row in enumerate(histories.numbers) if not row]
    if not without:
        return
    which = f"History {without[0]} of {len(histories)}" if len(histories) > 1 else "The history"
    others = f", as are {len(without) - 1} more" * (len(without) > 1)
    raise DataError(
        f"{which} is empty{others}.",
        rule="A model reads at least one item that it knows.",
        remedy=f"Give at least one item id{or_else}.",
    )


def checked_k(k: object, candidates: Candidates) -> int:
    """How many items are asked for.

    Raises:
        DataError: ``k`` is no whole number in 1..candidates.
    """
    num_items, fewest = candidates.items.num_items, candidates.fewest_allowed
    whole = isinstance(k, int | np.integer) and not isinstance(k, bool)
    if not whole or not 1 <= k <= fewest:  # type: ignore[operator]
        allowed = "" if candidates.allow is None else f", of which `allow` leaves {fewest}"
        raise DataError(
            f"k is {k!r}; there are {num_items} items{allowed}.",
            rule="k is a whole number in 1..number of candidates.",
            remedy="Give another k.",
        )
    return int(k)  # type: ignore[call-overload, no-any-return]
