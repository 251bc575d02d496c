"""Texts by number and numbers by text, for catalogues of any size: as Arrow arrays, never as a
Python object a text, and read from their file by range.

Shapes: I texts, n of them asked for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from threading import RLock
from typing import Any, Generic, TypeVar, overload

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

BLOCK = 1 << 16
"""Texts that are looked at together."""
HELD_BYTES = 1 << 28
"""Of a column's texts that stay in memory, those that were asked for last."""
FACTOR = np.uint64(0x9E3779B97F4A7C15)
"""Odd, so that products modulo 2^64 differ where words do."""
WORD = 8
OF_BYTES = np.array([(1 << 8 * length) - 1 for length in range(WORD + 1)], "<u8")
"""The first bytes of a word, by how many."""

T = TypeVar("T", str, str | None)
Words = npt.NDArray[np.uint64]
reading = RLock()
"""A file is read by one thread at a time."""


class Texts(Sequence[T], Generic[T]):
    """A column of texts that reads as a list of them does."""

    def __init__(self, lengths: Sequence[int], read: Callable[[int], Any]) -> None:
        """Args: lengths: texts of each chunk; read: a chunk by its number, an Arrow array of type
        string.
        """
        self._starts = np.cumsum([0, *lengths])
        self._read = read

    @classmethod
    def of(cls, column: Any) -> Texts[T]:
        """A ChunkedArray of type string."""
        chunks = column.chunks
        return cls([len(chunk) for chunk in chunks], chunks.__getitem__)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> list[T]: ...

    def __getitem__(self, index: int | slice) -> T | list[T]:
        """One text, or a list of several."""
        if isinstance(index, slice):
            return self.at(np.arange(*index.indices(len(self))))
        index = range(len(self))[index]
        chunk = int(np.searchsorted(self._starts, index, side="right")) - 1
        text: T = self._read(chunk)[index - int(self._starts[chunk])].as_py()
        return text

    def __iter__(self) -> Iterator[T]:
        for block in self.blocks():
            yield from block.to_pylist()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def at(self, indices: npt.NDArray[np.int64]) -> list[T]:
        """The texts at [n] indices; each chunk is read once."""
        order = indices.argsort(kind="stable")
        edges = np.searchsorted(indices[order], self._starts)
        texts = np.empty(len(indices), dtype=np.object_)
        for chunk in np.flatnonzero(np.diff(edges)).tolist():
            here = order[edges[chunk] : edges[chunk + 1]]
            taken = self._read(chunk).take(indices[here] - self._starts[chunk])
            texts[here] = taken.to_pylist()
        return texts.tolist()

    def between(self, start: int, stop: int) -> Any:
        """The texts from ``start`` up to ``stop``, as a ChunkedArray."""
        first, last = np.searchsorted(self._starts, [start, stop - 1], side="right") - 1
        chunks = [self._read(chunk) for chunk in range(first, last + 1)]
        column = pa.chunked_array(chunks, pa.string())
        return column.slice(start - int(self._starts[first]), stop - start)

    def blocks(self) -> Iterator[Any]:
        """All texts in order, as Arrow arrays of up to :data:`BLOCK`."""
        for start in range(0, len(self), BLOCK):
            yield self.between(start, min(start + BLOCK, len(self))).combine_chunks()

    @cached_property
    def any(self) -> bool:
        """Whether there is one that is neither missing nor empty."""
        return any(pc.any(pc.not_equal(block, pa.scalar(""))).as_py() for block in self.blocks())


class Kept:
    """The chunks that were asked for last, of :data:`HELD_BYTES` together."""

    def __init__(self, read: Callable[[int], Any]) -> None:
        """Args: read: a chunk by its number."""
        self._read = read
        self._chunks: OrderedDict[int, Any] = OrderedDict()

    def __call__(self, chunk: int) -> Any:
        """A chunk by its number."""
        with reading:
            array = self._chunks.pop(chunk) if chunk in self._chunks else self._read(chunk)
            self._chunks[chunk] = array
            while sum(kept.nbytes for kept in self._chunks.values()) > HELD_BYTES:
                self._chunks.popitem(last=False)
            return array


class Lookup:
    """Indices of texts, found by a hash and compared: 8 bytes a text.

    A key is the hash, whose lowest bits make room for the text's index; keys are sorted.
    """

    def __init__(self, texts: Texts[str]) -> None:
        """Args: texts: [I], no two alike."""
        self._texts = texts
        self._index_bits = np.uint64((1 << len(texts).bit_length()) - 1)
        self._keys = np.empty(len(texts), dtype=np.uint64)
        start = 0
        for block in texts.blocks():
            indices = np.arange(start, start + len(block), dtype=np.uint64)
            self._keys[start : start + len(block)] = hashed(block) & ~self._index_bits | indices
            start += len(block)
        self._keys.sort()

    def find(self, asked: Sequence[str]) -> npt.NDArray[np.int64]:
        """[n] index of each text; -1 where it is none of them."""
        hashes = hashed(pa.array(asked, pa.string())) & ~self._index_bits
        first = np.searchsorted(self._keys, hashes)
        counts = np.searchsorted(self._keys, hashes | self._index_bits, side="right") - first
        rows = np.repeat(np.arange(len(asked)), counts)
        before = counts.cumsum() - counts
        keys = self._keys[np.arange(len(rows)) + np.repeat(first - before, counts)]
        numbers, indices = np.full(len(asked), -1), (keys & self._index_bits).astype(np.int64)
        for row, index, text in zip(rows.tolist(), indices, self._texts.at(indices), strict=True):
            if text == asked[row]:  # hashes may meet
                numbers[row] = index
        return numbers


def hashed(texts: Any) -> Words:
    """[n] hash of each text of a StringArray, of 8 bytes at a time."""
    _, offsets, content = texts.buffers()
    if not len(texts) or content is None:
        return np.zeros(len(texts), dtype=np.uint64)
    ends = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    padded = np.zeros(ends[-1] - ends[0] + WORD, np.uint8)
    padded[:-WORD] = np.frombuffer(content, np.uint8)[ends[0] : ends[-1]]
    at_byte: Words = np.ndarray(len(padded) - WORD + 1, "<u8", padded, strides=(1,))
    starts, lengths = ends[:-1] - ends[0], np.diff(ends)
    hashes: Words = _mixed(lengths.astype(np.uint64))
    for start in range(0, int(lengths.max()), WORD):
        here = np.flatnonzero(lengths > start)
        words = at_byte[starts[here] + start] & OF_BYTES[np.minimum(lengths[here] - start, WORD)]
        hashes[here] = _mixed(hashes[here] ^ words)
    return hashes


def _mixed(words: Words) -> Words:
    """Other words for other ones, each of whose bits depends on all."""
    words = (words ^ (words >> np.uint64(32))) * FACTOR
    words = (words ^ (words >> np.uint64(29))) * FACTOR
    mixed: Words = words ^ (words >> np.uint64(32))
    return mixed
