"""Safetensors files written in pieces, to the disk: nothing is copied but a piece, and the hash
comes with it.

The bytes are those of the library's own `save_file`, but that a file's numbers begin at a multiple
of :data:`ALIGNMENT`, and the largest tensors of a format come first: who maps a file into memory
then finds these where torch would have put them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mltfr_dist.errors import DamagedError
from mltfr_dist.files import ALIGNMENT

PIECE_BYTES = 1 << 22
"""Bytes that are copied at a time."""

NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""As the format has them, in the order in which they stand in a file."""


class Streamed(NamedTuple):
    """A tensor that is never whole."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Iterable[Tensor]
    """Its parts along the first dimension, in order."""


class Stored(NamedTuple):
    """Where a file holds a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Bytes before it."""


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor | Streamed],
    beat: Callable[[], object] = lambda: None,
) -> str:
    """Write a file; returns its sha256.

    Args:
        path: Of the file.
        tensors: By name, on any device, or in blocks.
        beat: Called after each piece.

    Raises:
        OSError: The disk does not take it.
    """
    order = list(NAMES)

    def place(name: str) -> tuple[int, int, str]:
        return order.index(tensors[name].dtype), -_num_bytes(tensors[name]), name

    names = sorted(tensors, key=place)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as file:

        def put(content: bytes | memoryview) -> None:
            digest.update(content)
            left = memoryview(content)
            while left:
                left = left[file.write(left) :]
            beat()

        put(_header({name: tensors[name] for name in names}))
        for name in names:
            tensor = tensors[name]
            blocks = tensor.blocks if isinstance(tensor, Streamed) else (tensor,)
            for piece in (piece for block in blocks for piece in pieces(block)):
                put(piece.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        os.fsync(file.fileno())
    return digest.hexdigest()


def _num_bytes(tensor: Tensor | Streamed) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _header(tensors: Mapping[str, Tensor | Streamed]) -> bytes:
    """What stands before the numbers."""
    described, start = {}, 0
    for name, t in tensors.items():
        end = start + _num_bytes(t)
        described[name] = {
            "dtype": NAMES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [start, end],
        }
        start = end
    header = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    return len(header).to_bytes(8, "little") + header


def tensors_in(path: Path) -> dict[str, Stored]:
    """Where a file holds its tensors, by name.

    Raises:
        DamagedError: It is missing, or no safetensors file.
    """
    dtypes = {name: dtype for dtype, name in NAMES.items()}
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            described = json.loads(file.read(min(size, path.stat().st_size)))
        described.pop("__metadata__", None)
        return {
            name: Stored(dtypes[t["dtype"]], tuple(t["shape"]), 8 + size + t["data_offsets"][0])
            for name, t in described.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(
            f"{path} is missing or damaged: {error}.", remedy="Restore it from a copy."
        ) from None


def read_at(file: int, offset: int, into: Tensor) -> None:
    """Fill a tensor, contiguous and on the CPU, from an open file's bytes at ``offset``. They are
    read and not mapped: pages of a mapped file count as this process's memory.

    Raises:
        OSError: The file ends before, or cannot be read.
    """
    content = into.view(-1).view(torch.uint8).numpy().data
    while content:
        size = os.preadv(file, [content], offset)
        if not size:
            raise OSError("it ends before what it should hold")
        content, offset = content[size:], offset + size


def pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """A tensor in parts along its first dimension, of at most :data:`PIECE_BYTES` where a row has
    no more; one without dimensions as [1].
    """
    rows = tensor.reshape(1) if tensor.ndim == 0 else tensor
    if not rows.numel():
        return ()
    of_row = rows[0].numel() * rows.element_size()
    return torch.split(rows, max(1, PIECE_BYTES // of_row))
