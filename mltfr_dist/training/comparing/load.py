"""Ranks of users' targets as files hold them: of runs, of matrices, and from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mltfr_dist.data.shards.packed import IntArray
from mltfr_dist.errors import DataError
from mltfr_dist.invocation import command
from mltfr_dist.statistics.resampling import Floats
from mltfr_dist.training.evaluating.user_ranks import KEY
from mltfr_dist.training.run_folder import CONFIG, RANKS

NEEDED = ("user", "target", "rank")
SLICING: tuple[str, ...] = ("history_length", "popularity")
MATRIX_COLUMN = "ranks"
"""Of a matrix: each row's file of ranks, as seen from the matrix's folder."""


@dataclass(frozen=True)
class Measured:
    """The ranks of one model's targets on one split. Shapes: T targets."""

    path: Path
    about: dict[str, Any]
    """What the file says of itself; empty for files from elsewhere."""
    users: Any
    """[T] raw ids, as Arrow texts."""
    targets: Any
    """[T] raw ids, as Arrow texts."""
    ranks: Floats
    """[T] 1 is best."""
    slicing: dict[str, Floats]
    """``history_length`` and ``popularity`` [T], as far as the file has them."""

    @property
    def owners(self) -> IntArray:
        """[T] number of each target's user, from 0 in the order of their first targets."""
        return codes(self.users)

    @property
    def name(self) -> str:
        """How the file is called in a comparison: by its run's folder."""
        if self.path.name == RANKS:
            return self.path.absolute().parent.name
        return self.path.stem.removeprefix("ranks-")

    @property
    def seed(self) -> int | None:
        """The run's seed; None for baselines and files from elsewhere."""
        seed: int | None = self.about.get("seed")
        return seed


def rank_files(paths: Sequence[str | Path]) -> list[Path]:
    """The files of ranks that names of runs, matrices and files stand for, each once.

    Raises:
        DataError: A run without ranks, a matrix without them, or nothing there.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        files += _files_of(path)
    return list(dict.fromkeys(files))


def _files_of(path: Path) -> list[Path]:
    if path.is_dir():
        return [_of_run(path)]
    if not path.exists():
        raise DataError(
            f"{path} does not exist.",
            rule="What is compared are run folders, matrices of benchmarks/quality.py, and Parquet "
            f"files with the columns {', '.join(NEEDED)}.",
            remedy="Check the path.",
        )
    schema = _opened(path)
    if "variant" not in schema.names:
        return [path]
    if MATRIX_COLUMN not in schema.names:
        raise DataError(
            f"{path} is a matrix whose rows name no files of ranks.",
            rule="Matrices name them since runs keep the rank of each user.",
            remedy="Run benchmarks/quality.py again, or compare the matrix's means with "
            f"`{command('report')} {path}`.",
        )
    named = pq.read_table(path, columns=[MATRIX_COLUMN])[MATRIX_COLUMN].to_pylist()
    return [path.parent / name for name in named if name is not None]


def _of_run(folder: Path) -> Path:
    if (folder / RANKS).exists():
        return folder / RANKS
    if not (folder / CONFIG).exists():
        raise DataError(
            f"{folder} holds no run: there is no {CONFIG}.",
            remedy="Name a run's folder, such as runs/demo.",
        )
    raise DataError(
        f"The run {folder} has no {RANKS}.",
        rule="A run writes the rank of each user when it ends; runs of before did not.",
        remedy=f"`{command('evaluate')} {folder} --save-ranks` writes it for a finished run.",
    )


def read_ranks(path: Path, split: str) -> Measured:
    """The ranks of a split.

    Raises:
        DataError: Not Parquet, columns that are missing, ranks that are none, a user's target
            twice, or no such split.
    """
    schema = _opened(path)
    missing = [name for name in NEEDED if name not in schema.names]
    if missing:
        raise DataError(
            f"{path} has no column {', '.join(missing)}.",
            rule="A file of ranks has the columns user, target (raw ids) and rank (1 is best), "
            "and may have split, history_length and popularity.",
            remedy="Rename or add the column.",
        )
    table: Any = pq.read_table(path)
    if "split" in schema.names:
        table = table.filter(pc.equal(table["split"].cast(pa.string()), pa.scalar(split)))
    if not len(table):
        raise DataError(
            f"{path} holds no ranks of the {split} split.",
            remedy="Name the other with --split, or evaluate the run on this one.",
        )
    slicing = {name: _numbers(table, name, path) for name in SLICING if name in schema.names}
    about = json.loads((schema.metadata or {}).get(KEY, b"{}"))
    users, targets = (_ids(table, name, path) for name in ("user", "target"))
    measured = Measured(path, about, users, targets, _checked(table, path), slicing)
    _check_targets(measured)
    return measured


def _check_targets(measured: Measured) -> None:
    """Refuse a user's target that comes twice, or with the rank of another.

    Raises:
        DataError: One does.
    """
    owners = measured.owners
    if row := _repeated(owners, codes(measured.targets)):
        raise DataError(
            f"{measured.path} holds user {measured.users[row]} with the target "
            f"{measured.targets[row]} more than once.",
            rule="A row is a user's target, and a target that comes again counts once.",
            remedy="Keep one row a target, or name the split's rows by a column `split`.",
        )
    if row := _repeated(owners, np.unique(measured.ranks, return_inverse=True)[1]):
        raise DataError(
            f"{measured.path} gives two targets of user {measured.users[row]} the rank "
            f"{measured.ranks[row]:g}.",
            rule="Ranks are places in one ranking of all candidates, the user's other targets "
            "among them.",
            remedy="Give targets of equal score places one after the other.",
        )


def _repeated(owners: IntArray, values: IntArray) -> int:
    """A row whose user and value (from 0) an earlier row has; 0: there is none."""
    pairs = owners * (int(values.max()) + 1) + values
    first = np.unique(pairs, return_index=True)[1]
    rows = np.ones(len(pairs), bool)
    rows[first] = False
    return int(rows.argmax())


def codes(ids: Any) -> IntArray:
    """Raw ids [n] -> numbers [n] of the different ones, from 0 in the order of their coming."""
    numbers: IntArray = ids.dictionary_encode().indices.to_numpy().astype(np.int64)
    return numbers


def _numbers(table: Any, name: str, path: Path) -> Floats:
    """A column of numbers without gaps.

    Raises:
        DataError: It is none.
    """
    of = table[name].type
    if not (pa.types.is_integer(of) or pa.types.is_floating(of) or pa.types.is_decimal(of)):
        raise DataError(
            f"{path} has a column {name} of type {of}.",
            rule=f"{name} is a number.",
            remedy="Write the column as integers or floating-point numbers.",
        )
    values: Floats = table[name].to_numpy().astype(np.float64)
    if np.isnan(values).any():
        raise DataError(
            f"{path} has no {name} for user {table['user'][int(np.isnan(values).argmax())]}.",
            rule=f"{name} is known for each user, or the column is not there.",
            remedy=f"Fill it in, or leave out the {'row' if name in NEEDED else 'column'}.",
        )
    return values


def _ids(table: Any, name: str, path: Path) -> Any:
    """A column of raw ids without gaps, as texts.

    Raises:
        DataError: It is none.
    """
    column = table[name]
    of = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (pa.types.is_integer(of) or pa.types.is_string(of) or pa.types.is_large_string(of)):
        raise DataError(
            f"{path} has a column {name} of type {of}.",
            rule="Raw ids are texts or integers.",
            remedy="Write them as the raw data has them.",
        )
    if column.null_count:
        raise DataError(
            f"{path} has {column.null_count:,} rows without a {name}.",
            remedy="Fill it in, or leave the rows out.",
        )
    return column.cast(pa.string()).combine_chunks()


def _checked(table: Any, path: Path) -> Floats:
    ranks = _numbers(table, "rank", path)
    wrong = ~(ranks >= 1)
    if wrong.any():
        row = int(wrong.argmax())
        raise DataError(
            f"{path} gives user {table['user'][row]} the rank {ranks[row]:g}.",
            rule="Ranks begin at 1, the best.",
            remedy="Correct the file; a user who was not ranked has no row in it.",
        )
    return ranks


def _opened(path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{path} cannot be read as Parquet: {str(error).splitlines()[0].rstrip('.')}.",
            remedy="Name a run's folder, or a Parquet file of ranks.",
        ) from None
