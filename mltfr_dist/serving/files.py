"""Files of histories, read a bounded number of rows at a time: Parquet, CSV, JSON lines.

A row has `history`, the item ids of one user, oldest first: a list; in CSV they stand in one field,
between blanks or commas. `user_id` may be missing: then a row's number, from 1, stands for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from mltfr_dist.errors import DataError
from mltfr_dist.serving.histories import HISTORY, USER

READ_ROWS = 1024
SUFFIXES = (".parquet", ".csv", ".jsonl")


class Row(NamedTuple):
    """One user."""

    number: int
    """From 1."""
    user: object
    history: list[object] | None


def count_rows(path: Path) -> int:
    """Rows of the file; of CSV and JSON lines in a pass of its own.

    Raises:
        DataError: It cannot be read.
    """
    if _suffix(path) == ".parquet":
        return int(_opened(path).metadata.num_rows)
    if path.suffix == ".csv":
        return sum(batch.num_rows for batch in _csv(path))
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def user_type(path: Path) -> Any:
    """Arrow type of the users' ids: as in a Parquet file; texts elsewhere; row numbers where there
    are none.
    """
    if _suffix(path) != ".parquet":
        return pa.string()
    schema = _opened(path).schema_arrow
    return schema.field(USER).type if USER in schema.names else pa.int64()


def read_rows(path: Path) -> Iterator[Row]:
    """All rows, in order.

    Raises:
        DataError: It cannot be read, or has no column of histories.
    """
    kind = _suffix(path)
    if kind == ".jsonl":
        yield from _json_rows(path)
        return
    number = 0
    for batch in _parquet(path) if kind == ".parquet" else _csv(path):
        _check_columns(path, batch.schema.names)
        histories = batch.column(HISTORY).to_pylist()
        if USER in batch.schema.names:
            users = batch.column(USER).to_pylist()
        else:
            users = list(range(number + 1, number + 1 + len(histories)))
        for user, history in zip(users, histories, strict=True):
            number += 1
            if isinstance(history, str):
                history = [part for part in re.split(r"[\s,]+", history) if part]
            yield Row(number, user if kind == ".parquet" else str(user), history)


def _suffix(path: Path) -> str:
    if path.suffix not in SUFFIXES:
        raise DataError(
            f"{path} has the ending `{path.suffix}`.",
            rule=f"Files of histories end in {', '.join(SUFFIXES)}.",
            remedy="Convert or rename it.",
        )
    if not path.is_file():
        raise DataError(f"{path} is not there.", remedy="Name a file of histories.")
    return path.suffix


def _opened(path: Path) -> Any:
    try:
        return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None


def _parquet(path: Path) -> Iterator[Any]:
    file = _opened(path)
    _check_columns(path, file.schema_arrow.names)
    columns = [name for name in (USER, HISTORY) if name in file.schema_arrow.names]
    try:
        yield from file.iter_batches(batch_size=READ_ROWS, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None


def _csv(path: Path) -> Iterator[Any]:
    texts = pyarrow.csv.ConvertOptions(column_types={USER: pa.string(), HISTORY: pa.string()})
    read = pyarrow.csv.ReadOptions(block_size=1 << 20)
    try:
        yield from pyarrow.csv.open_csv(path, convert_options=texts, read_options=read)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None


def _json_rows(path: Path) -> Iterator[Row]:
    number = 0
    with path.open(encoding="utf-8") as file:
        for place, line in enumerate(file, 1):
            if not line.strip():
                continue
            number += 1
            try:
                row = json.loads(line)
            except ValueError as error:
                raise _unreadable(path, f"line {place}: {error}") from None
            _check_columns(path, row if isinstance(row, dict) else ())
            yield Row(number, str(row.get(USER, number)), row[HISTORY])


def _check_columns(path: Path, names: Any) -> None:
    if HISTORY not in names:
        raise DataError(
            f"{path} has no column `{HISTORY}` (it has {', '.join(names) or 'none'}).",
            rule=f"A row is a user: `{HISTORY}` holds the item ids, oldest first; `{USER}` may be "
            "missing.",
            remedy="Rename the column, or group the interactions by user first.",
        )


def _unreadable(path: Path, error: object) -> DataError:
    return DataError(f"{path} cannot be read: {error}.", remedy="Restore or convert the file.")
