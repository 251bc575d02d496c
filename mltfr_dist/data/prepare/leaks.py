"""Written training shards, read back and compared with the interactions: does any hold what lies at
or after its cut?

The check of splits.py proves the plan; this one proves the files, and trusts nothing that was made
from that plan. A sequence that is, item for item, the beginning of its user's history and no longer
than what lies before the cut holds nothing else. Of ``user_map`` it takes the numbers of users, of
``item_map`` those of items, and all else from ``ordered``.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import duckdb
import numpy as np

from mltfr_dist.data.prepare.write import ROWS_PER_RUN, item_indices
from mltfr_dist.data.shards.manifest import ShardInfo
from mltfr_dist.data.shards.packed import IntArray, PackedSequences
from mltfr_dist.data.shards.reader import read_shard
from mltfr_dist.errors import DataError


class _Histories(NamedTuple):
    """All interactions of n users, one history after the other, oldest first."""

    items: IntArray
    """[T] item ids."""
    starts: IntArray
    """[n] where each history begins."""
    allowed: IntArray
    """[n] how many of its interactions lie before the cut."""


def check_train_shards(
    connection: duckdb.DuckDBPyConnection,
    folder: Path,
    shards: Sequence[ShardInfo],
    *,
    num_items: int,
    cut: Decimal | None,
) -> int:
    """Read the training shards in ``folder`` and compare each sequence with its user's interactions
    before the cut.

    Args:
        connection: holds ``ordered``, ``user_map`` and ``item_map``.
        folder: where the shards are.
        shards: their entries for the manifest.
        num_items: greatest item id.
        cut: time of the first cut; None: leave one out, which cuts before a user's last two of
            three or more.

    Returns:
        interactions compared.

    Raises:
        DataError: a shard is damaged, or a sequence of it holds anything else.
    """
    indices = item_indices(connection)
    for info in shards:
        sequences = read_shard(folder, info, num_items=num_items)
        per_run = max(1, ROWS_PER_RUN * len(sequences) // len(sequences.items))
        for start in range(0, len(sequences), per_run):
            _check_run(
                connection, indices, folder / info.file, sequences.run(start, start + per_run), cut
            )
    return sum(info.num_items for info in shards)


def _check_run(
    connection: duckdb.DuckDBPyConnection,
    indices: np.ndarray,
    path: Path,
    sequences: PackedSequences,
    cut: Decimal | None,
) -> None:
    first, last = int(sequences.users.min()), int(sequences.users.max())
    histories = _histories(connection, indices, first, last, cut)
    users, lengths = sequences.users.astype(np.int64) - first, sequences.lengths
    longer = np.flatnonzero(lengths > histories.allowed[users])
    if len(longer):
        held, allowed = lengths[longer[0]], histories.allowed[users[longer[0]]]
        raise _leak(
            path,
            sequences.users[longer[0]],
            f"{held} items, of which {held - allowed} lie at or after the cut",
        )
    indices = np.repeat(histories.starts[users] - sequences.offsets[:-1], lengths) + np.arange(
        len(sequences.items)
    )
    other = np.flatnonzero(histories.items[indices] != sequences.items)
    if len(other):
        row = int(np.searchsorted(sequences.offsets, other[0], side="right")) - 1
        item, position = sequences.items[other[0]], other[0] - sequences.offsets[row]
        raise _leak(
            path,
            sequences.users[row],
            f"item {item} at position {position}, where its history has another",
        )


def _histories(
    connection: duckdb.DuckDBPyConnection,
    indices: np.ndarray,
    first: int,
    last: int,
    cut: Decimal | None,
) -> _Histories:
    """The histories of the users ``first`` to ``last``, in the order of time itself and not of the
    recorded positions.
    """
    codes = connection.execute(
        "SELECT user_code FROM user_map WHERE user_index >= $1 AND user_index <= $2 ORDER BY "
        "user_index",
        [first, last],
    ).fetchnumpy()["user_code"]
    before = "true" if cut is None else f"timestamp < CAST('{cut}' AS DECIMAL(38, 9))"
    rows = connection.execute(
        f"SELECT user_code, item_code, {before} AS before FROM ordered WHERE user_code >= $1 AND "
        f"user_code <= $2 "
        "ORDER BY user_code, timestamp, position",
        [int(codes[0]), int(codes[-1])],
    ).fetchnumpy()
    starts = np.searchsorted(rows["user_code"], codes)
    allowed = np.add.reduceat(rows["before"], starts, dtype=np.int64)
    if cut is None:
        allowed[allowed >= 3] -= 2
    return _Histories(indices[rows["item_code"]], starts, allowed)


def _leak(path: Path, user: int, holds: str) -> DataError:
    return DataError(
        f"{path}: the training sequence of user {user} (user_index) holds {holds}.",
        rule="A training sequence is the beginning of its user's history, and all of it lies "
        "before the cut.",
        remedy="Prepare again into a new folder; if it happens there too, please report it as a "
        "defect.",
    )
