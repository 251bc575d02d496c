"""Tables of model2vec: rows that tokens may share, and a weight for each token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from mltfr_dist.errors import DataError
from mltfr_dist.tables.checkpoints.stored import FLOAT_DTYPES, StoredTensor, bytes_of

ReadRows = Callable[[int, int], tuple[bytes | memoryview, torch.Tensor]]

Rows = tuple[tuple[str, ...], str, int, ReadRows]
"""Files, number format for the log, number of rows, and how they are read."""

_INTEGERS = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64")


def static_rows(table: StoredTensor, held: Mapping[str, Sequence[Path]]) -> Rows:
    """Rows by token id: ``embeddings[mapping[id]] * weights[id]``, as model2vec embeds a token.

    Args:
        table: the tensor ``embeddings``; in integers it is used as it stands, as model2vec does,
            since the one scale of such a table is stored nowhere.
        held: the files of all tensors; ``mapping`` and ``weights`` are read if there.

    Raises:
        DataError: the tensors do not fit one another.
    """
    per_token = {
        name: StoredTensor.find(name, held[name][0])
        for name in ("mapping", "weights")
        if name in held
    }
    sizes = {name: one.shape for name, one in per_token.items()}
    if table.dtype not in (*FLOAT_DTYPES, "I8") or any(len(one) != 1 for one in sizes.values()):
        raise _misfit(table, f"{table.dtype} with {sizes}")
    if len(set(sizes.values()) | (set() if "mapping" in sizes else {table.shape[:1]})) > 1:
        raise _misfit(table, f"{list(table.shape)} with {sizes}")
    row_of = weight = None
    if mapping := per_token.get("mapping"):
        if mapping.dtype not in _INTEGERS or 0 in mapping.shape:
            raise _misfit(table, f"a mapping in {mapping.dtype} {list(mapping.shape)}")
        row_of = mapping.whole().to(torch.int64)  # [V_m]
        if int(row_of.min()) < 0 or int(row_of.max()) >= table.shape[0]:
            raise _misfit(table, f"{table.shape[0]} rows and a mapping to row {int(row_of.max())}")
    if weights := per_token.get("weights"):
        weight = weights.whole()[:, None]  # [V_m, 1]

    def read_rows(start: int, stop: int) -> tuple[bytes | memoryview, torch.Tensor]:
        rows = table.rows(start, stop) if row_of is None else table.rows_at(row_of[start:stop])
        if weight is None:
            return bytes_of(rows), rows.to(torch.float32)
        block = weight[start:stop].contiguous()
        values = rows.to(torch.float64) * block.to(torch.float64)
        return bytes_of(rows) + bytes_of(block), values.to(torch.float32)

    applied = " x ".join(f"{name} {one.dtype}" for name, one in per_token.items())
    dtype = f"{table.dtype} x {applied}" if applied else table.dtype
    num_rows = table.shape[0] if row_of is None else len(row_of)
    return (table.file.name,), dtype, num_rows, read_rows


def _misfit(table: StoredTensor, content: str) -> DataError:
    return DataError(
        f"{table.file} is not as model2vec writes it: {content}.",
        rule="There is a row for each token, or a mapping from each token to its row; "
        "and at most one weight for each token.",
        remedy="Fetch the checkpoint again.",
    )
