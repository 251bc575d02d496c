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

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.distributed.row_layout import RowLayout
from mltfr_dist.distributed.sending import send_bytes, send_text
from mltfr_dist.distributed.tensor_file import pieces, read_at, tensors_in
from mltfr_dist.distributed.watchdog import heartbeat
from mltfr_dist.errors import DamagedError

MODEL_ROWS, OPTIMIZER_ROWS = "model-rows", "optimizer-rows"
BLOCK_BYTES = 1 << 25
"""Rows of a whole table that are read and sent together."""


def file_name(kind: str, rank: int, world_size: int) -> str:
    """Of the rows that one of so many ranks wrote."""
    return f"{kind}-{rank:05d}-of-{world_size:05d}.safetensors"


def files_of(kind: str, names: Iterable[str]) -> list[str]:
    """Those of a checkpoint's files that hold rows of this kind, in the order of their ranks."""
    return sorted(name for name in names if name.startswith(f"{kind}-"))


def read_run(
    folder: Path, files: list[str], name: str, layout: RowLayout, first: int, into: Tensor
) -> None:
    """Read the rows at positions ``first`` and following from the files that hold them.

    Args:
        folder: The checkpoint.
        files: All of one kind, in the order of their ranks.
        name: Of the tensor.
        layout: Of the table, for any number of ranks.
        first: Position of the first row.
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
            stored = tensors_in(folder / file)[name]
            if (stored.dtype, stored.shape) != (torch.float32, (stop - start, into.shape[1])):
                raise OSError(f"{name} holds {stored.shape} of {stored.dtype}")
            with (folder / file).open("rb", buffering=0) as opened:
                for begin, block in positions(into[low - first : high - first], low - start):
                    rows = torch.empty(block.shape)
                    read_at(opened.fileno(), stored.offset + begin * rows[0].nbytes, rows)
                    block.copy_(rows)
                    heartbeat()
        except (OSError, KeyError) as error:
            raise DamagedError(
                f"{folder / file} is missing or damaged: {error}.",
                rule="A divided item table's rows lie in the files that state.json names.",
                remedy="Start the run's command again: it passes over what is damaged. Every node "
                "must see the run's folder.",
            ) from None


def positions(rows: Tensor, first: int) -> Iterable[tuple[int, Tensor]]:
    """Blocks of ``rows``, each with the number of its first, counted from ``first``."""
    for block in pieces(rows):
        yield first, block
        first += len(block)


def shapes_of(folder: Path, files: list[str]) -> dict[str, list[int]]:
    """Shapes [R, D] by name of what the files of one kind hold together.

    Raises:
        DamagedError: A file is missing or damaged.
    """
    shapes: dict[str, list[int]] = {}
    for file in files:
        for name, stored in tensors_in(folder / file).items():
            rows, columns = stored.shape
            shapes[name] = [shapes.get(name, [0])[0] + rows, columns]
    return shapes


def blocks_of(num_rows: int, columns: int) -> Iterator[tuple[int, Tensor]]:
    """Positions in the order of rows: the first of a block, and the ids [n] of all of the block."""
    layout, step = RowLayout(num_rows, 1), max(1, BLOCK_BYTES // (4 * columns))
    for first in range(0, num_rows, step):
        yield first, layout.ids_between(first, min(first + step, num_rows))


def assemble(
    folder: Path, files: list[str], beat: Callable[[], object] = heartbeat
) -> dict[str, Tensor]:
    """Whole tensors [R, D] by name, in the order of items, from all files of one kind.

    Raises:
        DamagedError: A file is missing or damaged.
    """
    tables = {}
    for name, (num_rows, columns) in shapes_of(folder, files).items():
        tables[name] = whole = torch.empty(num_rows, columns)
        for first, ids in blocks_of(num_rows, columns):
            block = torch.empty(len(ids), columns)
            read_run(folder, files, name, RowLayout(num_rows, 1), first, block)
            whole[ids] = block
            beat()
    return tables


class RowBlock(NamedTuple):
    """Some rows of a tensor."""

    name: str
    shape: tuple[int, int]
    """Of the whole, (R, D)."""
    ids: Tensor
    """[n]."""
    rows: Tensor
    """[n, D]."""


def send_rows(folder: Path, files: list[str], ranks: Ranks) -> Iterator[RowBlock]:
    """All that the files of one kind hold, some rows at a time, which rank 0 reads and sends. All
    ranks must go through all.

    Raises:
        DamagedError: A file is missing or damaged.
    """
    shapes_read = ranks.on_rank0(lambda _: shapes_of(folder, files))
    shapes: dict[str, list[int]] = json.loads(send_text(json.dumps(shapes_read), ranks))
    for name, (num_rows, columns) in shapes.items():
        layout = RowLayout(num_rows, 1)
        for first, ids in blocks_of(num_rows, columns):
            block = torch.empty(len(ids), columns)
            ranks.on_rank0(partial(_read_block, folder, files, name, layout, first, block))
            send_bytes(block.view(-1).view(torch.uint8), ranks)
            yield RowBlock(name, (num_rows, columns), ids, block)


def _read_block(
    folder: Path,
    files: list[str],
    name: str,
    layout: RowLayout,
    first: int,
    into: Tensor,
    _heartbeat: object,
) -> None:
    read_run(folder, files, name, layout, first, into)
