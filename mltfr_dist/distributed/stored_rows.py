"""An item table that stays in its files: rows are read when they are asked for, some at a time.

For what goes through all rows once (an export, an index) on a machine whose memory does not hold
them. Files are read, not mapped: pages of a mapped file would count as this process's memory.

Shapes: R rows of the table, U rows asked for, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mltfr_dist.distributed.checkpoint import MODEL, read_header, row_files
from mltfr_dist.distributed.row_layout import RowLayout
from mltfr_dist.distributed.tensor_file import Stored, read_at, tensors_in
from mltfr_dist.errors import DamagedError
from mltfr_dist.models.divided_rows import DividedRows, Division

BLOCK_BYTES = 1 << 24
"""Rows that are read together."""
ITEM_TABLES = ("backbone.item_embedding.weight", "backbone.item_embedding.embedding.weight")
"""Names of the item table among a model's tensors, without and with item tokens."""


class Run(NamedTuple):
    """Rows that follow each other in a file."""

    path: Path
    offset: int
    """Bytes before the first."""
    first: int
    """Position of the first in the whole order."""


class StoredRows(Division):
    """R rows in files; this process holds none of them."""

    def __init__(self, runs: Sequence[Run], dim: int, layout: RowLayout | None) -> None:
        """Args: runs: of all rows, in their order; dim: D; layout: the order, None for that of
        ids.
        """
        self.runs, self.dim, self.layout = runs, dim, layout
        self.own_ids = torch.zeros(0, dtype=torch.int64)

    def positions(self, item_ids: Tensor) -> Tensor:
        """Ids [...] -> positions [...] in the files' order."""
        return item_ids if self.layout is None else self.layout.positions(item_ids)

    def fetch(self, own: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows at ascending ``positions`` [U], each once -> [U, D], where ``own`` [0, D] is.

        Raises:
            DamagedError: A file ends before them, or cannot be read.
        """
        positions = positions.cpu()
        rows = torch.empty(len(positions), self.dim)
        edges = torch.searchsorted(positions, torch.tensor([run.first for run in self.runs]))
        for run, (start, stop) in zip(
            self.runs, pairwise([*edges.tolist(), len(positions)]), strict=True
        ):
            if start < stop:
                _read(run, positions[start:stop] - run.first, rows[start:stop])
        return rows.to(own.device, dtype)


def _read(run: Run, rows: Tensor, into: Tensor) -> None:
    """Read ascending ``rows`` of a file into [U, D]; those that follow each other at once."""
    breaks, of_row = (rows.diff() != 1).nonzero()[:, 0] + 1, 4 * into.shape[1]
    try:
        with run.path.open("rb", buffering=0) as file:
            for start, stop in pairwise([0, *breaks.tolist(), len(rows)]):
                read_at(file.fileno(), run.offset + int(rows[start]) * of_row, into[start:stop])
    except OSError as error:
        raise DamagedError(
            f"{run.path} is missing or damaged: {error}.",
            remedy="Restore it from a copy, or write it again.",
        ) from None


def items_of_checkpoint(folder: Path) -> Callable[[int], Division] | None:
    """How so many rows are read from a checkpoint that ranks wrote divided; None where it holds
    them whole.

    Raises:
        DamagedError: The header or a file is missing or unreadable.
    """
    files = row_files(read_header(folder), MODEL)
    return partial(_divided, [folder / name for name in files]) if files else None


def _divided(paths: Sequence[Path], num_rows: int) -> StoredRows:
    layout = RowLayout(num_rows, len(paths))
    tables = [_item_table(path) for path in paths]
    for path, stored, (first, end) in zip(paths, tables, pairwise(layout.bounds), strict=True):
        if stored.shape[0] != end - first:
            raise DamagedError(
                f"{path} holds {stored.shape[0]:,} rows of an item table in place of "
                f"{end - first:,}.",
                remedy="Restore it from a copy.",
            )
    runs = [Run(*one) for one in zip(paths, [p.offset for p in tables], layout.bounds)]
    return StoredRows(runs, tables[0].shape[1], layout)


def items_of_file(path: Path) -> Callable[[int], Division]:
    """How rows are read from a file that holds the whole table in the order of ids, as exports
    do.
    """

    def divide(num_rows: int) -> StoredRows:
        stored = _item_table(path)
        assert stored.shape[0] == num_rows
        return StoredRows([Run(path, stored.offset, 0)], stored.shape[1], None)

    return divide


def _item_table(path: Path) -> Stored:
    tables = [stored for name, stored in tensors_in(path).items() if name in ITEM_TABLES]
    if len(tables) != 1 or tables[0].dtype != torch.float32:
        raise DamagedError(
            f"{path} holds no item table in float32.", remedy="Restore it from a copy."
        )
    return tables[0]


def blocks(rows: DividedRows) -> Iterator[Tensor]:
    """[n, D] rows of a table in the order of ids, some at a time. Every process must call."""
    step = max(1, BLOCK_BYTES // (4 * rows.embedding_dim))
    for start in range(0, rows.num_embeddings, step):
        ids = torch.arange(start, min(start + step, rows.num_embeddings))
        ids = ids.to(rows.weight.device)
        rows.look_up(ids)
        yield rows(ids)
