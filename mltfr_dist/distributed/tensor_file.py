"""Safetensors files written in pieces, to the disk: nothing is copied but a piece, and the hash
comes with it. The bytes are those of the library's own `save_file`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

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


def write_tensors(path: Path, tensors: Mapping[str, Tensor], beat: Callable[[], object]) -> str:
    """Write a file; returns its sha256.

    Args:
        path: Of the file.
        tensors: By name, on any device.
        beat: Called after each piece.

    Raises:
        OSError: The disk does not take it.
    """
    order = list(NAMES)
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
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
            for piece in pieces(tensors[name]):
                put(piece.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        os.fsync(file.fileno())
    return digest.hexdigest()


def _header(tensors: Mapping[str, Tensor]) -> bytes:
    """What stands before the numbers."""
    described, start = {}, 0
    for name, t in tensors.items():
        end = start + t.numel() * t.element_size()
        described[name] = {
            "dtype": NAMES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [start, end],
        }
        start = end
    header = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """A tensor in parts along its first dimension, of at most :data:`PIECE_BYTES` where a row has
    no more; one without dimensions as [1].
    """
    rows = tensor.reshape(1) if tensor.ndim == 0 else tensor
    if not rows.numel():
        return ()
    of_row = rows[0].numel() * rows.element_size()
    return torch.split(rows, max(1, PIECE_BYTES // of_row))
