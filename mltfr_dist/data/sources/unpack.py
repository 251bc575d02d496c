"""Compressed files and members of zip files -> their content, verified by their checksums."""

from __future__ import annotations

import bz2
import io
import itertools
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa

from mltfr_dist.data.sources.inputs import COMPRESSIONS, ZIP_MAGIC, Given

DAMAGED = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zipfile.BadZipFile)
"""What reading a damaged file raises."""
BLOCK_BYTES = 1 << 20
_XZ_MEMORY = 512 << 20


def compression_of(start: bytes) -> str:
    """Ending of the compression that a file's first bytes show; empty: of none."""
    if start.startswith(b"BZh"):  # may also begin a text
        return ".bz2" if re.match(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", start) else ""
    kinds = COMPRESSIONS | {".zip": ZIP_MAGIC}
    return next((ending for ending, magic in kinds.items() if start.startswith(magic)), "")


def has_checksum(file: Given) -> bool:
    """Whether damage shows: all kinds carry a checksum but Zstandard, which may leave it out."""
    if file.compressions != (".zst",) or file.member is not None:
        return True
    with file.path.open("rb") as raw:
        start = raw.read(5)
    return len(start) < 5 or bool(start[4] & 4)


def unpacked_size(file: Given) -> int:
    """Bytes that ``file`` takes at least when it is unpacked, as far as its headers say."""
    if file.member is not None:
        with zipfile.ZipFile(file.path) as archive:
            return archive.getinfo(file.member).file_size
    size = file.path.stat().st_size
    if file.compressions == (".gz",) and size > 18:
        with file.path.open("rb") as raw:
            raw.seek(-4, 2)
            claimed = int.from_bytes(raw.read(4), "little")  # of the last member, modulo 2 ** 32
        return max(size, claimed) if claimed < 1032 * size else size
    return size


def unpacked(file: Given) -> Iterator[bytes]:
    """The plain content in blocks; at its end every checksum has been compared.

    Raises:
        one of :data:`DAMAGED`: the file is damaged, or something else.
    """
    with file.path.open("rb") as raw:
        blocks = iter(lambda: raw.read(BLOCK_BYTES), b"")
        if file.member is not None:
            blocks = _member(file, file.member)
        for compression in file.compressions:
            blocks = _zstd(blocks) if compression == ".zst" else _members(blocks, compression)
        yield from blocks


def _member(file: Given, name: str) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(file.path) as archive, archive.open(name) as opened:
            while block := opened.read(BLOCK_BYTES):
                yield block
    except (NotImplementedError, RuntimeError) as error:  # its method of compression
        raise zipfile.BadZipFile(str(error)) from None


class _Gzip:
    """zlib's decompressor, in the form that those of bz2 and lzma have."""

    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=31)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._zlib.decompress(data or self._zlib.unconsumed_tail, max_length)

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    @property
    def needs_input(self) -> bool:
        return not self._zlib.unconsumed_tail

    @property
    def unused_data(self) -> bytes:
        return self._zlib.unused_data


def _decompressor(compression: str) -> Any:
    if compression == ".gz":
        return _Gzip()
    if compression == ".bz2":
        return bz2.BZ2Decompressor()
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)


def _members(blocks: Iterable[bytes], compression: str) -> Iterator[bytes]:
    """Members one after the other; zeros may follow one, as tools add them, and nothing else."""
    decompressor = _decompressor(compression)
    for data in blocks:
        while data:
            if decompressor.eof:
                data = data.lstrip(b"\0")
                if not data:
                    break
                decompressor = _decompressor(compression)
            yield decompressor.decompress(data, BLOCK_BYTES)
            while not decompressor.eof and not decompressor.needs_input:
                yield decompressor.decompress(b"", BLOCK_BYTES)
            data = decompressor.unused_data
    if not decompressor.eof:
        raise EOFError("its end is missing")


class _Reading(io.RawIOBase):
    """Blocks as a file."""

    def __init__(self, blocks: Iterable[bytes]) -> None:
        self._blocks, self._rest = iter(blocks), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._rest or next(self._blocks, b"")
        size = min(len(data), len(buffer))
        buffer[:size], self._rest = data[:size], data[size:]
        return size


def _zstd(blocks: Iterable[bytes]) -> Iterator[bytes]:
    blocks = iter(blocks)
    first = next(blocks, b"")
    if not first:
        raise EOFError("it is empty")
    reading = pa.PythonFile(_Reading(itertools.chain([first], blocks)), mode="r")
    with pa.CompressedInputStream(reading, "zstd") as stream:
        while block := stream.read(BLOCK_BYTES):
            yield block
