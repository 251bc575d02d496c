"""Files as given -> plain files: unpacked and verified, text in UTF-8 with one kind of line end.

A file that is plain already is read where it lies. Of others a copy is made in the workspace's
temporary folder, before anything is read of it, and removed when the rows are in the database.
"""

from __future__ import annotations

import codecs
import errno
import hashlib
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import IO

from mltfr_dist.data.sources.identity import TextMarks
from mltfr_dist.data.sources.inputs import (
    COMPRESSIONS,
    PARQUET_MAGIC,
    STANDARD_INPUT,
    Given,
    InputFile,
    given_file,
)
from mltfr_dist.data.sources.unpack import (
    BLOCK_BYTES,
    DAMAGED,
    compression_of,
    has_checksum,
    unpacked,
    unpacked_size,
)
from mltfr_dist.errors import DataError

Log = Callable[[str], None]
_SPARE = 64 << 20
"""Bytes that a copy leaves free."""


# --- streams --------------------------------------------------------------------------------------


def spool_stream(source: str, configured: str, folder: Path, log: Log) -> Given:
    """Copy standard input, or a FIFO, into ``folder``, once; a compression shows at its beginning.

    Args:
        source: `-`, or the path of the FIFO.
        configured: the format that the user names, or `auto`.
        folder: for the copy.
        log: told what the first bytes show.

    Raises:
        DataError: it is empty, cut off, or its format is neither named nor to be seen.
    """
    is_standard = source == STANDARD_INPUT
    name = "standard input" if is_standard else source
    if is_standard and sys.stdin is None:
        raise DataError("Standard input is closed.", remedy="Pipe the data in, or give a file.")
    copy = folder / f"{hashlib.sha256(name.encode()).hexdigest()[:12]}.stream"
    try:
        with nullcontext(sys.stdin.buffer) if is_standard else Path(source).open("rb") as stream:
            start = stream.read(4096)
            given = _given_stream(copy, name, start)
            if not given.ending and configured == "auto":
                raise DataError(
                    f"{name} does not show of which format it is.",
                    remedy="Name it, as in `--format csv`.",
                )
            _write(copy, _chain(start, stream), name)
    except OSError as error:
        raise DataError(
            f"{name} cannot be read: {error.strerror}.", remedy="Check what writes into it."
        ) from None
    log(f"{name}: {copy.stat().st_size:,} bytes")
    return given


def _given_stream(copy: Path, name: str, start: bytes) -> Given:
    compression = compression_of(start)
    if not start or compression == ".zip":
        raise DataError(
            f"{name} is empty." if not start else f"{name} is a zip file, which cannot be piped.",
            remedy="Check what writes into it." if not start else "Give the zip file by its path.",
        )
    by_name = given_file(copy, name)
    ending = ".parquet" if start.startswith(PARQUET_MAGIC) else by_name.ending
    compressions = by_name.compressions or ((compression,) if compression in COMPRESSIONS else ())
    return replace(by_name, ending=ending, compressions=compressions)


def _chain(start: bytes, stream: IO[bytes]) -> Iterator[bytes]:
    yield start
    while block := stream.read(BLOCK_BYTES):
        yield block


# --- copies ---------------------------------------------------------------------------------------


@contextmanager
def plain_files(
    given: Sequence[Given],
    marks: Sequence[TextMarks],
    folder: Path,
    log: Log,
    *,
    is_sequences: bool = False,
) -> Iterator[list[InputFile]]:
    """Files that can be read, one for each of ``given``; copies stay until the block ends.

    Args:
        given: the files as the user has them.
        marks: of each, what :func:`identify` found.
        folder: for copies; what it held is removed.
        log: told what is read otherwise than it lies.
        is_sequences: lines are of any length, so that a carriage return in the middle cannot be
            told from a line end.

    Raises:
        DataError: a file is damaged, not what its name says, or there is no room for a copy.
    """
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield [
            _plain_file(file, own, folder / f"{number:05d}", log, is_sequences)
            for number, (file, own) in enumerate(zip(given, marks))
        ]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _plain_file(
    file: Given, marks: TextMarks, target: Path, log: Log, is_sequences: bool
) -> InputFile:
    path = file.path
    if file.member is not None or file.compressions:
        path, marks = target.with_suffix(".unpacked"), TextMarks()
        _check_room(file, target.parent)
        if not has_checksum(file):
            log(f"{file.name} carries no checksum: damage to it would not show.")
        _write(path, _watched(unpacked(file), marks), file.name, file)
    compression = compression_of(marks.start)
    if compression:
        raise DataError(
            f"{file.name} is compressed inside, as {compression} files are.",
            rule="The ending of a name says how a file is compressed.",
            remedy=f"Rename it, adding {compression} to its name.",
        )
    reason = marks.needs_copy()
    if not reason:
        _refuse_zeros(file.name, marks)
        return file.as_input(path)
    if marks.lone_cr and is_sequences and (marks.has_bare_lf or marks.crlf):
        raise DataError(
            f"{file.name} holds {marks.lone_cr:,} carriage returns within lines.",
            rule="Lines of sequence text have no fixed length, so that it cannot be told whether "
            "each ends a line.",
            remedy="Replace them by line feeds or by blanks.",
        )
    copy = target.with_suffix(".text")
    log(f"{file.name} has {reason}: a copy in UTF-8 with line ends LF is read.")
    _write(copy, _normalised(path, marks.encoding), file.name)
    if path != file.path:
        path.unlink()
    return file.as_input(copy)


def _refuse_zeros(name: str, marks: TextMarks) -> None:
    is_text = not marks.start.startswith(PARQUET_MAGIC)
    if is_text and marks.start.count(0) * 4 > len(marks.start):
        order = "LE" if marks.start[:1] != b"\0" else "BE"
        raise DataError(
            f"{name} is no UTF-8 text; it looks like UTF-16 without a byte order mark.",
            remedy=f"Convert it: `iconv -f UTF-16{order} -t UTF-8 OLD > NEW`.",
        )


def _watched(blocks: Iterable[bytes], marks: TextMarks) -> Iterator[bytes]:
    for block in blocks:
        marks.add(block)
        yield block


def _normalised(path: Path, encoding: str) -> Iterator[bytes]:
    """UTF-8 without a byte order mark, each line end one LF: lines keep their numbers."""
    decoder = codecs.getincrementaldecoder(encoding)("strict") if encoding != "utf-8" else None
    with path.open("rb") as file:
        rest = b""
        file.seek({"utf-8": 0}.get(encoding, 2))
        if encoding == "utf-8" and file.read(3) != codecs.BOM_UTF8:
            file.seek(0)
        while block := file.read(BLOCK_BYTES):
            data = rest + (decoder.decode(block).encode() if decoder else block)
            rest = data[-1:] if data.endswith(b"\r") else b""  # its LF may come with the next
            yield data[: len(data) - len(rest)].replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if decoder:
            decoder.decode(b"", final=True)
        yield rest.replace(b"\r", b"\n")


def _write(path: Path, blocks: Iterable[bytes], name: str, packed: Given | None = None) -> None:
    """Write ``blocks``; nothing stays of a copy that fails."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as out:
            for block in _verified(blocks, name, packed):
                out.write(block)
    except OSError as error:
        path.unlink(missing_ok=True)
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = f"{path.parent} is full" if is_full else f"{path.parent}: {error.strerror}"
        raise _no_copy(name, reason) from None
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _verified(blocks: Iterable[bytes], name: str, packed: Given | None) -> Iterator[bytes]:
    try:
        yield from blocks
    except DAMAGED as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        what = "is damaged or cut off" if packed else "cannot be read to its end"
        raise DataError(f"{name} {what}: {reason}.", remedy="Fetch or copy it again.") from None


def _no_copy(name: str, reason: str) -> DataError:
    return DataError(
        f"No copy of {name} can be made: {reason}.",
        rule="What is compressed, piped or of mixed line ends is read from a copy.",
        remedy="Free disk there, or give `--temp-dir DIR` on another one.",
    )


def _check_room(file: Given, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    size, free = unpacked_size(file), shutil.disk_usage(folder).free
    if size + _SPARE > free:
        reason = f"it takes {size / 1e9:,.2f} GB, but {folder} has {free / 1e9:,.2f} GB left"
        raise _no_copy(file.name, reason)
