"""A table's rows in a safetensors file, written and read in blocks: none need fit into memory.

Shapes: V rows, D columns, float32.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from mltfr_dist.errors import DataError

TENSOR_NAME = "token_table"

BLOCK_ENTRIES = 1 << 18
"""Numbers in a block: 2 MiB in float64; a few such blocks live at a time."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into an error for the user.

    Raises:
        DataError: ``path`` cannot be written: no permission, no space, no folder.
    """
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error.strerror or error}.",
            remedy="Give a folder with --output that can, and that has space for the table.",
        ) from None


def header(num_rows: int, dim: int) -> bytes:
    """The head of a file with the tensor :data:`TENSOR_NAME`, to the byte as the library's."""
    described = {"dtype": "F32", "shape": [num_rows, dim], "data_offsets": [0, 4 * num_rows * dim]}
    text = json.dumps({TENSOR_NAME: described}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


class RowFile:
    """[V, D] float32 rows in a new safetensors file. Close it, or use it in a `with`."""

    def __init__(self, path: Path, num_rows: int, dim: int) -> None:
        """Make the file.

        Raises:
            DataError: it cannot be written.
        """
        self.path, self.num_rows, self.dim = path, num_rows, dim
        head = header(num_rows, dim)
        self._first = len(head)
        with writing(path):
            self._file = path.open("x+b", buffering=0)
            self._file.write(head)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, start: int, rows: torch.Tensor) -> None:
        """Set the rows from number ``start`` on to ``rows`` [n, D].

        Raises:
            DataError: the disk is full, or fails.
        """
        data = rows.contiguous().view(torch.uint8).numpy().reshape(-1).data
        offset = self._first + 4 * self.dim * start
        with writing(self.path):
            while data:  # the kernel may take a part
                written = os.pwrite(self._file.fileno(), data, offset)
                data, offset = data[written:], offset + written

    def blocks(self, num_entries: int = BLOCK_ENTRIES) -> Iterator[tuple[int, torch.Tensor]]:
        """All rows in order as (first row, copies [n, D]) of at most ``num_entries`` numbers."""
        step = max(1, num_entries // self.dim)
        for start in range(0, self.num_rows, step):
            block = torch.empty(min(step, self.num_rows - start), self.dim)
            self._file.seek(self._first + 4 * self.dim * start)
            read_into(self._file, block)
            yield start, block


def read_into(file: io.RawIOBase | io.BufferedIOBase, rows: torch.Tensor) -> None:
    """Fill ``rows`` [n, D] from where ``file`` stands.

    Raises:
        EOFError: the file ends before.
    """
    view = rows.view(torch.uint8).numpy().reshape(-1).data
    while view:
        size = file.readinto(view)
        if not size:
            raise EOFError("the file ends within the table")
        view = view[size:]
