"""Files of histories, read a bounded number of rows at a time: Parquet, CSV, JSON lines.

A row has `history`, the item ids of one user, oldest first: a list; in CSV they stand in one field,
between blanks or commas. `user_id` may be missing: then a row's number, from 1, stands for it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from mltfr_dist.errors import DataError
from mltfr_dist.files import unique_keys
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
        DataError: It cannot be read, has no column of histories, or a user without an id.
    """
    for row in _rows(path):
        if row.user is None or row.user == "":
            raise DataError(
                f"Row {row.number} of {path} has no {USER}.",
                rule="A row is answered by its user's id; without the column, by its number.",
                remedy="Fill it in, or leave the row or the whole column out.",
            )
        yield row


def _rows(path: Path) -> Iterator[Row]:
    kind = _suffix(path)
    if kind == ".jsonl":
        yield from _json_rows(path)
        return
    number = 0
    for batch in _parquet(path) if kind == ".parquet" else _csv(path):
        histories = batch.column(HISTORY).to_pylist()
        if USER in batch.schema.names:
            users = batch.column(USER).to_pylist()
        else:
            users = list(range(number + 1, number + 1 + len(histories)))
            users = users if kind == ".parquet" else [str(user) for user in users]
        for user, history in zip(users, histories, strict=True):
            number += 1
            if isinstance(history, str):
                history = [item_id for item_id in re.split(r"[\s,]+", history) if item_id]
            yield Row(number, user, history)


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
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None
    _check_columns(path, file.schema_arrow.names)
    return file


def _parquet(path: Path) -> Iterator[Any]:
    file = _opened(path)
    columns = [name for name in (USER, HISTORY) if name in file.schema_arrow.names]
    try:
        yield from file.iter_batches(batch_size=READ_ROWS, columns=columns)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None


def _csv(path: Path) -> Iterator[Any]:
    texts = pyarrow.csv.ConvertOptions(column_types={USER: pa.string(), HISTORY: pa.string()})
    read = pyarrow.csv.ReadOptions(block_size=1 << 20)
    try:
        batches = pyarrow.csv.open_csv(path, convert_options=texts, read_options=read)
        _check_columns(path, batches.schema.names)
        yield from batches
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from None


def _json_rows(path: Path) -> Iterator[Row]:
    number = 0
    with path.open("rb") as file:
        for line_number, line in enumerate(file, 1):
            if not line.strip():
                continue
            number += 1
            try:
                text = line.decode("utf-8-sig" if line_number == 1 else "utf-8")
                row = json.loads(text, object_pairs_hook=unique_keys)
            except ValueError as error:
                raise _unreadable(path, f"line {line_number}: {error}") from None
            _check_columns(path, list(row) if isinstance(row, dict) else [])
            user = row.get(USER, number)
            if isinstance(user, bool | float | list | dict):
                raise DataError(
                    f"Line {line_number} of {path} has the {USER} {user!r}.",
                    rule="A user's id is a text or a whole number.",
                    remedy="Write it as one.",
                )
            yield Row(number, None if user is None else str(user), row[HISTORY])


def _check_columns(path: Path, names: Sequence[str]) -> None:
    for name in (HISTORY, USER):
        if names.count(name) > 1:
            raise DataError(
                f"{path} has {names.count(name)} columns `{name}`.",
                remedy="Leave one of them, or rename the others.",
            )
    if HISTORY not in names:
        raise DataError(
            f"{path} has no column `{HISTORY}` (it has {', '.join(names) or 'none'}).",
            rule=f"A row is a user: `{HISTORY}` holds the item ids, oldest first; `{USER}` may be "
            "missing.",
            remedy="Rename the column, or group the interactions by user first.",
        )


def _unreadable(path: Path, error: object) -> DataError:
    return DataError(
        f"{path} cannot be read: {str(error).rstrip('.')}.", remedy="Restore or convert the file."
    )
