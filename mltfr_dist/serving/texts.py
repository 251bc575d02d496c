"""Texts by number and numbers by text, for catalogues of any size: as Arrow arrays, never as a
Python object a text.

Shapes: I texts, n of them asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

BLOCK = 1 << 16
"""Texts that are looked at together."""
FACTOR = 0x9E3779B97F4A7C15
"""Odd, so that its powers modulo 2^64 never vanish."""

T = TypeVar("T", str, str | None)
Words = npt.NDArray[np.uint64]


class Texts(Sequence[T], Generic[T]):
    """An Arrow column of texts that reads as a list of them does."""

    def __init__(self, column: Any) -> None:
        """Args: column: [I] ChunkedArray of type string."""
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: int | slice) -> T | list[T]:
        """One text, or a list of several."""
        if isinstance(index, slice):
            return list(self.at(np.arange(*index.indices(len(self)))))
        text: T = self.column[index].as_py()
        return text

    def __iter__(self) -> Iterator[T]:
        for start in range(0, len(self), BLOCK):
            yield from self.column.slice(start, BLOCK).to_pylist()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def at(self, indices: npt.NDArray[np.int64]) -> list[T]:
        """The texts at [n] indices."""
        return [self[index] for index in indices.tolist()]

    @property
    def any(self) -> bool:
        """Whether there is one that is neither missing nor empty."""
        return bool(pc.any(pc.not_equal(self.column, pa.scalar(""))).as_py())


class Lookup:
    """Indices of texts, found by a hash of 64 bits and compared: 12 bytes a text."""

    def __init__(self, texts: Texts[str]) -> None:
        """Args: texts: [I], no two alike."""
        self._texts = texts
        hashes = np.empty(len(texts), dtype=np.uint64)
        for start in range(0, len(texts), BLOCK):
            block = texts.column.slice(start, BLOCK).combine_chunks()
            hashes[start : start + BLOCK] = hashed(block)
        order = hashes.argsort()
        self._order = order.astype(np.min_scalar_type(len(texts)))
        self._hashes = hashes[order]

    def find(self, asked: Sequence[str]) -> npt.NDArray[np.int64]:
        """[n] index of each text; -1 where it is none of them."""
        numbers, hashes = np.full(len(asked), -1), hashed(pa.array(asked, pa.string()))
        first = np.searchsorted(self._hashes, hashes)
        for number, (text, word) in enumerate(zip(asked, hashes, strict=True)):
            for index in range(first[number], len(self._hashes)):
                if self._hashes[index] != word:
                    break
                if self._texts[int(self._order[index])] == text:  # hashes may meet
                    numbers[number] = self._order[index]
                    break
        return numbers


def hashed(texts: Any) -> Words:
    """[n] hash of each text of a StringArray: the polynomial of its bytes, modulo 2^64, mixed."""
    _, offsets, content = texts.buffers()
    if not len(texts) or content is None:
        return np.zeros(len(texts), dtype=np.uint64)
    ends = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    read = np.frombuffer(content, np.uint8)[ends[0] : ends[-1]]
    ends = ends - ends[0]
    lengths = np.diff(ends)
    powers = np.full(int(lengths.max()) + 1, FACTOR, dtype=np.uint64).cumprod()
    index = np.arange(len(read)) - np.repeat(ends[:-1], lengths)
    sums = np.zeros(len(read) + 1, dtype=np.uint64)
    np.cumsum((read + np.uint64(1)) * powers[index], out=sums[1:])
    words = sums[ends[1:]] - sums[ends[:-1]]
    words = (words ^ (words >> np.uint64(32))) * np.uint64(FACTOR)
    mixed: Words = words ^ (words >> np.uint64(29))
    return mixed
