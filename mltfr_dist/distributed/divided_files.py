"""Checkpoints of an item table that is divided by rows: each rank writes and reads its own rows, in
pieces.

Beside `model.safetensors`, which has all else, lie `model-rows-00000-of-00002.safetensors` and so
on, and of moments `optimizer-rows-...`: runs of the order of `row_layout.py`, in fp32. Rank 0
writes the header last, with the hash of every file, and renames the folder: it is complete or
absent. Another number of ranks reads the runs that hold its own rows; a rank that holds the whole
table reads all of them. Unlike all else, these files are opened by every rank, so that every node
must see the run's folder.

Shapes: R rows of the table, O of this rank, D hidden size.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mltfr_dist.distributed.row_layout import RowLayout
from mltfr_dist.distributed.watchdog import heartbeat
from mltfr_dist.errors import DamagedError

MODEL_ROWS, OPTIMIZER_ROWS = "model-rows", "optimizer-rows"
PIECE_BYTES = 1 << 22
"""Bytes that are copied at a time."""

DTYPES = {torch.float32: "F32", torch.float64: "F64"}


def file_name(kind: str, rank: int, world_size: int) -> str:
    """Of the rows that one of so many ranks wrote."""
    return f"{kind}-{rank:05d}-of-{world_size:05d}.safetensors"


def files_of(kind: str, names: Iterable[str]) -> list[str]:
    """Those of a checkpoint's files that hold rows of this kind, in the order of their ranks."""
    return sorted(name for name in names if name.startswith(f"{kind}-"))


def write_rows(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file piece by piece, to the disk; returns its sha256.

    Args:
        path: Of the file.
        tensors: Name to [O, D] rows, on any device.

    Raises:
        OSError: The disk does not take it.
    """
    described, start = {}, 0
    for name, t in tensors.items():
        end = start + t.numel() * t.element_size()
        described[name] = {
            "dtype": DTYPES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [start, end],
        }
        start = end
    header = json.dumps(described).encode()
    header += b" " * (-len(header) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:

        def put(content: bytes | memoryview) -> None:
            digest.update(content)
            file.write(content)
            heartbeat()

        put(len(header).to_bytes(8, "little") + header)
        for t in tensors.values():
            for piece in pieces(t):
                put(piece.detach().cpu().contiguous().numpy().data.cast("B"))
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def pieces(rows: Tensor) -> tuple[Tensor, ...]:
    """Rows in parts of at most :data:`PIECE_BYTES`."""
    of_row = max(1, rows.shape[1] * rows.element_size())
    return torch.split(rows, max(1, PIECE_BYTES // of_row)) if len(rows) else ()


def read_run(
    folder: Path, files: list[str], name: str, layout: RowLayout, first: int, into: Tensor
) -> None:
    """Read the rows at places ``first`` and following from the files that hold them.

    Args:
        folder: The checkpoint.
        files: All of one kind, in the order of their ranks.
        name: Of the tensor.
        layout: Of the table, for any number of ranks.
        first: Place of the first row.
        into: [n, D] filled.

    Raises:
        DamagedError: A file is missing, cut off, or holds other rows than those of its rank.
    """
    bounds = RowLayout(layout.num_rows, max(1, len(files))).bounds
    end = first + len(into)
    for file, (start, stop) in zip(files, pairwise(bounds), strict=True):
        low, high = max(first, start), min(end, stop)
        if low >= high:
            continue
        try:
            with safe_open(folder / file, framework="pt") as opened:
                rows = opened.get_slice(name)
                if rows.get_shape() != [stop - start, into.shape[1]]:
                    raise SafetensorError(f"{name} has the shape {rows.get_shape()}")
                for begin, part in positions(into[low - first : high - first], low - start):
                    part.copy_(rows[begin : begin + len(part)])
                    heartbeat()
        except (OSError, SafetensorError) as error:
            raise DamagedError(
                f"{folder / file} is missing or damaged: {error}.",
                rule="A divided item table's rows lie in the files that state.json names.",
                remedy="Start the run's command again: it passes over what is damaged. Every node "
                "must see the run's folder.",
            ) from None


def positions(rows: Tensor, first: int) -> Iterable[tuple[int, Tensor]]:
    """Parts of ``rows``, each with the number of its first, counted from ``first``."""
    for part in pieces(rows):
        yield first, part
        first += len(part)


def assemble(
    folder: Path, files: list[str], beat: Callable[[], object] = heartbeat
) -> dict[str, Tensor]:
    """Whole tensors [R, D] by name, in the order of items, from all files of one kind.

    Raises:
        DamagedError: A file is missing or damaged.
    """
    shapes: dict[str, list[int]] = {}
    for file in files:
        try:
            with safe_open(folder / file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    rows, columns = opened.get_slice(name).get_shape()
                    shapes[name] = [shapes.get(name, [0])[0] + rows, columns]
        except (OSError, SafetensorError) as error:
            raise DamagedError(
                f"{folder / file} is missing or damaged: {error}.",
                remedy="Start the run's command again: it passes over what is damaged.",
            ) from None
    found = {}
    for name, (num_rows, columns) in shapes.items():
        layout = RowLayout(num_rows, len(files))
        found[name] = whole = torch.empty(num_rows, columns)
        for first, end in pairwise(layout.bounds):
            part = torch.empty(end - first, columns)
            read_run(folder, files, name, layout, first, part)
            whole[layout.ids_between(first, end)] = part
            beat()
    return found
