"""Reads the header of a GGUF file: what there is and where; values only when asked for.

Every claimed size is compared with the bytes of the file before anything is allocated.
"""

from __future__ import annotations

import math
import mmap
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mltfr_dist.errors import DataError
from mltfr_dist.tables.checkpoints.source import refuse_pointer

_ORDER = "<" if sys.byteorder == "little" else ">"
_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
"""GGUF's number of a value's type to the letter of ``struct``."""
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_SMALLEST_FIELD, _SMALLEST_TENSOR = 13, 24
_MOST_DIMENSIONS = 8
_MOST_NESTED = 4
_LONGEST_NAME = 1 << 16


@dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies.

    Attributes:
        shape: as GGUF states it, columns first. kind: GGUF's number of the format.
        offset: of its first byte in the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


class Damaged(Exception):  # noqa: N818 (never leaves this package)
    """What is wrong with a header."""


class GgufHeader:
    """The fields and tensors of one file.

    Attributes:
        tensors: by name.

    Raises:
        DataError: the file is no GGUF file of version 2 or 3, is damaged or cut short, or has the
            other byte order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fields: dict[str, tuple[int, int]] = {}  # type and position of the value
        self.tensors: dict[str, GgufTensor] = {}
        with self._reader() as reader:
            self._read(reader)

    def __contains__(self, key: str) -> bool:
        return key in self._fields

    def get(self, key: str) -> Any:
        """A field's value: a number, a text or a list of such; None where there is no such field.

        Bytes of a text that are not UTF-8 become U+FFFD.
        """
        if key not in self._fields:
            return None
        with self._reader() as reader:
            kind, reader.position = self._fields[key]
            return reader.value(kind)

    @contextmanager
    def _reader(self) -> Iterator[_Reader]:
        refuse_pointer(self.path)
        try:
            with (
                self.path.open("rb") as file,
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
            ):
                yield _Reader(data)
        except (Damaged, OSError, ValueError) as error:  # ValueError: an empty file has no mapping
            raise DataError(
                f"{self.path} cannot be read as GGUF: {error}.",
                remedy="Fetch the file again; it is damaged.",
            ) from None

    def _read(self, reader: _Reader) -> None:
        if reader.take(4) != b"GGUF":
            raise Damaged("it does not begin as such a file does")
        version = reader.number("I")
        if version & 0xFFFF == 0 and version:
            raise DataError(
                f"{self.path} has the other byte order.",
                remedy="Use a GGUF file made for this kind of machine.",
            )
        if version not in _VERSIONS:
            raise Damaged(f"it has version {version}; known are {_VERSIONS}")
        num_tensors, num_fields = reader.number("Q"), reader.number("Q")
        reader.expect(num_fields * _SMALLEST_FIELD + num_tensors * _SMALLEST_TENSOR)
        for _ in range(num_fields):
            key, kind = reader.name(), reader.number("I")
            if key in self._fields:
                raise Damaged(f"it has two fields {key}")
            self._fields[key] = (kind, reader.position)
            reader.skip(kind)
        tensors = [self._tensor(reader) for _ in range(num_tensors)]
        alignment = 32
        if "general.alignment" in self._fields:
            kind, position = self._fields["general.alignment"]
            alignment = (
                struct.unpack_from(_ORDER + "I", reader.data, position)[0] if kind == 4 else 0
            )
            if alignment == 0 or alignment & (alignment - 1):
                raise Damaged("its general.alignment is no power of two")
        start = -(-reader.position // alignment) * alignment
        for tensor in tensors:
            if tensor.name in self.tensors:
                raise Damaged(f"it has two tensors {tensor.name}")
            self.tensors[tensor.name] = GgufTensor(
                tensor.name, tensor.shape, tensor.kind, start + tensor.offset
            )

    @staticmethod
    def _tensor(reader: _Reader) -> GgufTensor:
        name, count = reader.name(), reader.number("I")
        if count > _MOST_DIMENSIONS:
            raise Damaged(f"its tensor {name} claims {count} dimensions")
        shape = tuple(reader.number("Q") for _ in range(count))
        if math.prod(shape) >= 1 << 63:
            raise Damaged(f"its tensor {name} claims the shape {list(shape)}")
        return GgufTensor(name, shape, reader.number("I"), reader.number("Q"))


class _Reader:
    """Steps through a header."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.position, self.size = data, 0, len(data)

    def expect(self, size: int) -> None:
        """Raise Damaged unless ``size`` bytes follow."""
        if size > self.size - self.position:
            raise Damaged(
                f"it claims {size:,} bytes at {self.position:,} and has {self.size:,} in all"
            )

    def take(self, size: int) -> bytes:
        self.expect(size)
        self.position += size
        return self.data[self.position - size : self.position]

    def number(self, letter: str) -> int:
        return int(struct.unpack(_ORDER + letter, self.take(struct.calcsize("=" + letter)))[0])

    def name(self) -> str:
        size = self.number("Q")
        if size > _LONGEST_NAME:
            raise Damaged(f"it has a name of {size:,} bytes")
        raw = self.take(size)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise Damaged(f"it has the name {raw[:40]!r}, which is not UTF-8") from None

    def array(self) -> tuple[int, int]:
        """Type and number of an array's elements."""
        kind, count = self.number("I"), self.number("Q")
        if kind in _SCALARS:
            self.expect(count * struct.calcsize("=" + _SCALARS[kind]))
        elif kind in (_STRING, _ARRAY):
            self.expect(count * (8 if kind == _STRING else 12))
        else:
            raise Damaged(f"it has an array of the unknown type {kind}")
        return kind, count

    def skip(self, kind: int, depth: int = 0) -> None:
        """Step over a value."""
        if kind in _SCALARS:
            self.take(struct.calcsize("=" + _SCALARS[kind]))
        elif kind == _STRING:
            size = self.number("Q")
            self.expect(size)
            self.position += size
        elif kind == _ARRAY:
            if depth == _MOST_NESTED:
                raise Damaged("it has arrays nested too deep")
            inner, count = self.array()
            if inner in _SCALARS:
                self.position += count * struct.calcsize("=" + _SCALARS[inner])
            elif inner == _STRING:
                for _, end in self._texts(count):
                    self.position = end
            else:
                for _ in range(count):
                    self.skip(_ARRAY, depth + 1)
        else:
            raise Damaged(f"it has a field of the unknown type {kind}")

    def value(self, kind: int) -> Any:
        """Read a value that :meth:`skip` has stepped over."""
        if kind in _SCALARS:
            letter = _SCALARS[kind]
            return struct.unpack(_ORDER + letter, self.take(struct.calcsize("=" + letter)))[0]
        if kind == _STRING:
            return self.take(self.number("Q")).decode("utf-8", errors="replace")
        inner, count = self.array()
        if inner in _SCALARS:
            dtype = np.dtype(_ORDER + _SCALARS[inner])
            return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
        if inner == _STRING:
            data = self.data
            return [
                data[start:end].decode("utf-8", errors="replace")
                for start, end in self._texts(count)
            ]
        return [self.value(_ARRAY) for _ in range(count)]

    def _texts(self, count: int) -> Iterator[tuple[int, int]]:
        """Begin and end of each of the texts that follow."""
        length, data, end = struct.Struct(_ORDER + "Q").unpack_from, self.data, self.position
        for _ in range(count):
            start = end + 8
            if start > self.size or (end := start + length(data, start - 8)[0]) > self.size:
                raise Damaged("the texts of a list go beyond its end")
            yield start, end
