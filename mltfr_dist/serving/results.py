"""What is recommended, and its way into lists, NumPy, pandas, polars and Arrow.

Shapes: B histories, k items a history.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import numpy.typing as npt

from mltfr_dist.errors import ConfigError
from mltfr_dist.serving.items import ItemMap

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Recommendation:
    """One recommended item."""

    item_id: str
    title: str | None
    score: float


@dataclass(frozen=True)
class Recommendations(Sequence[list[Recommendation]]):
    """The best items of each history: a sequence of lists, best first."""

    items: ItemMap
    numbers: npt.NDArray[np.int64]
    """[B, k] numbers of the items; 0 where a history has fewer candidates."""
    scores: npt.NDArray[np.float32]
    """[B, k]; -inf where there is no item. Of an empty history, the items' counts in the data."""
    users: list[object] | None
    """Whose histories they are, where a table said so."""
    dropped: int
    """Unknown ids that were left out of the histories."""

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> list[Recommendation]: ...

    @overload
    def __getitem__(self, index: slice) -> list[list[Recommendation]]: ...

    def __getitem__(self, index: int | slice) -> list[Recommendation] | list[list[Recommendation]]:
        """Those of one history, or of several."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        numbers = self.numbers[index]
        ids, titles = self.items.ids.at(numbers), self.items.titles.at(numbers)
        rows = zip(numbers.tolist(), ids, titles, self.scores[index].tolist(), strict=True)
        return [Recommendation(raw, title, score) for n, raw, title, score in rows if n]

    def __iter__(self) -> Iterator[list[Recommendation]]:
        return (self[index] for index in range(len(self)))

    @property
    def item_ids(self) -> list[list[str]]:
        """Raw ids of each history's items, best first."""
        return [[raw for raw in row if raw] for row in self._texts().tolist()]

    def to_numpy(self) -> tuple[npt.NDArray[np.str_], npt.NDArray[np.float32]]:
        """Raw ids [B, k] (empty where there is no item) and scores [B, k]."""
        return self._texts().astype(np.str_), self.scores

    def _texts(self) -> npt.NDArray[np.object_]:
        """[B, k] raw ids; empty where there is no item."""
        texts = np.array(self.items.ids.at(self.numbers.ravel()), dtype=np.object_)
        return texts.reshape(self.numbers.shape)

    def to_arrow(self) -> pa.Table:
        """A row an item: ``user_id`` (the history's index where there are none), ``rank`` from 1,
        ``item_id``, ``score``, and ``title`` where the data has titles.
        """
        import pyarrow as pa

        rows, indices = (self.numbers > 0).nonzero()
        chosen = self.numbers[rows, indices]
        users = rows if self.users is None else [self.users[row] for row in rows.tolist()]
        columns: dict[str, Any] = {
            "user_id": users,
            "rank": (indices + 1).astype(np.int32),
            "item_id": self.items.ids.at(chosen),
            "score": self.scores[rows, indices],
        }
        if self.items.titles.any:
            columns["title"] = self.items.titles.at(chosen)
        return pa.table(columns)

    def to_pandas(self) -> Any:
        """:meth:`to_arrow` as a pandas DataFrame.

        Raises:
            ConfigError: pandas is not installed.
        """
        _needs("pandas")
        return self.to_arrow().to_pandas()

    def to_polars(self) -> Any:
        """:meth:`to_arrow` as a polars DataFrame.

        Raises:
            ConfigError: polars is not installed.
        """
        return _needs("polars").from_arrow(self.to_arrow())


def _needs(module: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError:
        raise ConfigError(
            f"{module} is not installed.",
            rule=f"A {module} frame is made by {module}.",
            remedy=f"Install it (`pip install {module}`), or use to_arrow().",
        ) from None
