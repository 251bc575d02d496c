"""Tables in memory (pandas, polars, Arrow and others) -> a Parquet file that is read like any
other.

Neither pandas nor polars is imported: a frame hands out its columns by Arrow's C stream protocol
(`__arrow_c_stream__`), or by the older `__dataframe__`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyarrow.interchange.from_dataframe import from_dataframe

from mltfr_dist.data.sources.inputs import Content, Given
from mltfr_dist.errors import DataError

_PROTOCOLS = ("__arrow_c_stream__", "__dataframe__")


def is_frame(source: object) -> bool:
    """Whether ``source`` is a table in memory, not the name of one."""
    return not isinstance(source, type) and any(hasattr(source, name) for name in _PROTOCOLS)


def write_frame(frame: object, name: str, folder: Path) -> Given:
    """Write a frame into ``folder``, batch by batch, and take the hash of its content on the way.

    Args:
        frame: For which :func:`is_frame` holds; of a stream, what is left of it.
        name: What messages and the manifest call it.
        folder: For the file.

    Raises:
        DataError: Its columns cannot be handed out (a column of mixed types), or it is no table.
    """
    reader = _reader(frame, name)
    path = folder / f"{hashlib.sha256(name.encode()).hexdigest()[:12]}.parquet"
    folder.mkdir(parents=True, exist_ok=True)
    schema = pa.schema([pa.field(f.name, _plain_type(f.type)) for f in reader.schema])
    digest = FrameHash(schema)
    try:
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for batch in reader:
                rows = pa.Table.from_batches([batch]).cast(schema)
                digest.add(rows)
                writer.write_table(rows)
    except pa.ArrowException as error:
        path.unlink(missing_ok=True)
        raise _unreadable(name, error) from None
    return Given(path, name, ending=".parquet", content=digest.content())


class FrameHash:
    """sha256 of names, types and values of a table, however it is cut into batches."""

    def __init__(self, schema: pa.Schema) -> None:
        self._columns = [(f"{f.name}\0{f.type}", _ColumnHash()) for f in schema]

    def add(self, rows: pa.Table) -> None:
        """The next rows."""
        for (_, column), values in zip(self._columns, rows.columns):
            for chunk in values.chunks:
                column.add(chunk)

    def content(self) -> Content:
        """Of all rows that were added."""
        digest = hashlib.sha256()
        for named, column in self._columns:
            digest.update(f"{len(named)} {named} {column.hexdigest()}\n".encode())
        return Content(sum(column.bytes for _, column in self._columns), digest.hexdigest())


class _ColumnHash:
    """Which values are there, lengths of texts and lists, and the values: a digest each."""

    def __init__(self) -> None:
        self._valid, self._lengths, self._values = (hashlib.sha256() for _ in range(3))
        self._inner: _ColumnHash | None = None
        self.bytes = 0

    def add(self, values: Any) -> None:
        """The next values, an array of Arrow."""
        kind = values.type
        self._valid.update(pc.is_valid(values).to_numpy(zero_copy_only=False).tobytes())
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            self._add_lengths(pc.list_value_length(values))
            self._inner = self._inner or _ColumnHash()
            before = self._inner.bytes
            self._inner.add(pc.list_flatten(values))
            self.bytes += self._inner.bytes - before
            return
        if pa.types.is_large_string(kind) or pa.types.is_large_binary(kind):
            self._add_lengths(pc.binary_length(values))
            self._add_values(_text_bytes(values.cast(pa.large_binary()).drop_null()))
            return
        if pa.types.is_temporal(kind) and kind.bit_width in (32, 64):
            values = values.view(pa.int32() if kind.bit_width == 32 else pa.int64())
        elif not pa.types.is_primitive(kind):  # decimals; others are refused when they are read
            self._add_values("".join(f"{value!r}\n" for value in values.to_pylist()).encode())
            return
        self._add_values(values.drop_null().to_numpy(zero_copy_only=False).tobytes())

    def _add_lengths(self, lengths: Any) -> None:
        numbers = lengths.cast(pa.int64()).drop_null()
        self._lengths.update(numbers.to_numpy().astype("<i8").tobytes())

    def _add_values(self, data: bytes) -> None:
        self._values.update(data)
        self.bytes += len(data)

    def hexdigest(self) -> str:
        inner = self._inner.hexdigest() if self._inner else ""
        digests = (self._valid, self._lengths, self._values)
        return " ".join([*(digest.hexdigest() for digest in digests), inner])


def _text_bytes(values: Any) -> bytes:
    """The bytes of texts without nulls, one behind the other."""
    _, offsets, data = values.buffers()
    if not len(values) or data is None:
        return b""
    bounds = memoryview(offsets).cast("q")
    return bytes(memoryview(data)[bounds[values.offset] : bounds[values.offset + len(values)]])


def _plain_type(kind: Any) -> Any:
    """The type that is written: one for texts, however they lie in memory."""
    if pa.types.is_dictionary(kind):
        return _plain_type(kind.value_type)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view():
        return pa.large_string()
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or kind == pa.binary_view():
        return pa.large_binary()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.large_list(_plain_type(kind.value_type))
    return kind


def _reader(frame: Any, name: str) -> pa.RecordBatchReader:
    try:
        if hasattr(frame, "__arrow_c_stream__"):
            return pa.RecordBatchReader.from_stream(frame)
        table: pa.Table = from_dataframe(frame)
        return table.to_reader()
    except (pa.ArrowException, TypeError, ValueError, NotImplementedError, RuntimeError) as error:
        raise _unreadable(name, error) from None


def _unreadable(name: str, error: Exception) -> DataError:
    said = [str(argument).rstrip(".") for argument in error.args] or [type(error).__name__]
    return DataError(
        f"{name} cannot be read: {'; '.join(said)}.",
        rule="A frame is a table of named columns, each of one type.",
        remedy="Convert the column to one type, as with `frame.astype({'item_id': str})` in "
        "pandas.",
    )
