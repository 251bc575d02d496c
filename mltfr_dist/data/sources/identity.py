"""A file as it was given: its hash, and what its text needs to be read; both in one pass."""

from __future__ import annotations

import codecs
import hashlib
from dataclasses import dataclass
from pathlib import Path

from mltfr_dist.data.sources.inputs import PARQUET_MAGIC
from mltfr_dist.errors import DataError

_BLOCK_BYTES = 1 << 20
_START_BYTES = 4096
_UTF_16 = {codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}


class TextMarks:
    """What a text file needs before it can be read, seen while its bytes pass by."""

    def __init__(self) -> None:
        self.start = b""
        """Its first bytes, at most 4096."""
        self.crlf = self.cr = 0
        self.has_bare_lf = False
        self._ends_in_cr = False

    def add(self, block: bytes | memoryview) -> None:
        """The next bytes."""
        data = bytes(block)
        if len(self.start) < _START_BYTES:
            self.start += data[: _START_BYTES - len(self.start)]
        if b"\r" not in data and not self._ends_in_cr:
            self.has_bare_lf = self.has_bare_lf or b"\n" in data
            return
        pairs = data.count(b"\r\n") + (self._ends_in_cr and data[:1] == b"\n")
        self.crlf += pairs
        self.cr += data.count(b"\r")
        self.has_bare_lf = self.has_bare_lf or data.count(b"\n") > pairs
        self._ends_in_cr = data[-1:] == b"\r"

    @property
    def lone_cr(self) -> int:
        """Carriage returns without a line feed behind them."""
        return self.cr - self.crlf

    @property
    def encoding(self) -> str:
        """By the byte order mark."""
        return _UTF_16.get(self.start[:2], "utf-8")

    def needs_copy(self) -> str:
        """Why the file cannot be read as it lies; empty: it can."""
        if self.start.startswith(PARQUET_MAGIC):
            return ""
        if self.encoding != "utf-8":
            return self.encoding.upper()
        if self.start.startswith(codecs.BOM_UTF8):
            return "a byte order mark"
        kinds = {"CRLF": self.crlf, "LF": self.has_bare_lf, "CR": self.lone_cr}
        ends = [kind for kind, has_it in kinds.items() if has_it]
        return f"line ends {' and '.join(ends)}" if len(ends) > 1 or ends == ["CR"] else ""


@dataclass(frozen=True)
class Identity:
    """A file as it was given, read through once."""

    bytes: int
    sha256: str
    marks: TextMarks
    modified: int
    """Nanoseconds since 1970, before it was read."""

    def still_holds(self, path: Path) -> bool:
        """Whether the file has the size and time that it had."""
        now = path.stat()
        return (now.st_size, now.st_mtime_ns) == (self.bytes, self.modified)


def identify(path: Path, name: str) -> Identity:
    """sha256, size and marks of a file, in one pass.

    Raises:
        DataError: it cannot be read.
    """
    digest, marks, size = hashlib.sha256(), TextMarks(), 0
    try:
        modified = path.stat().st_mtime_ns
        with path.open("rb", buffering=0) as file:
            is_text = file.read(4) != PARQUET_MAGIC
            file.seek(0)
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
                size += len(block)
                if is_text:
                    marks.add(block)
                elif not marks.start:
                    marks.start = block[:_START_BYTES]
    except OSError as error:
        raise DataError(
            f"{name} cannot be read: {error.strerror}.", remedy="Check the file and its rights."
        ) from None
    return Identity(size, digest.hexdigest(), marks, modified)
