"""Checkpoints: whole tensors in safetensors and a JSON header. No pickle; complete or absent, never
half.

A checkpoint is a folder, written beside its path and renamed into it. Learning rate, dropout,
negatives and data order are functions of (seed, stage, step), so beside tensors the state is a few
numbers, and the same at any world size.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from mltfr_dist.distributed.divided_files import (
    MODEL_ROWS,
    OPTIMIZER_ROWS,
    assemble,
    files_of,
)
from mltfr_dist.distributed.lock import check_held
from mltfr_dist.distributed.tensor_file import write_tensors
from mltfr_dist.distributed.watchdog import heartbeat
from mltfr_dist.errors import CheckpointError, DamagedError
from mltfr_dist.files import file_sha256
from mltfr_dist.headers import parse_header
from mltfr_dist.schema import Section

SCHEMA_VERSION = 3
DRAWS = 5
"""Of dropout: 1, by torch's generator; 2, on a CPU by `models/dropout.py`; 3, there by several
generators in turn; 4, on a GPU for all tables together; 5, there where they have no shortlist, too.
"""
HEADER = "state.json"
PARTIAL = ".partial-"
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
PASSED_OVER = "Start the run's command again: it passes over what is damaged."
NOT_A_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class Progress(Section):
    """Where a run stands: enough to go on from."""

    stage: str
    """"train" (bare or stage 1) or "consensus" (stage 2)."""
    step: int = 0
    """Global batches trained on in the stage: updates made, and skipped."""
    skipped_steps: int = 0
    """Of these, updates skipped because a loss or gradient was not finite."""
    skipped_in_a_row: int = 0
    """Of these, the last ones."""
    epoch: int = 0
    """Epoch in which the next update falls."""
    step_in_epoch: int = 0
    """Updates made in that epoch; with ``epoch`` the state of the stream."""
    best: tuple[tuple[int, float], ...] = ()
    """(epochs completed, `evaluation.select_by`) of the stage's best validations so far, best
    first: `checkpoint.keep_best` of them."""
    train_seconds: float = 0.0
    """Wall time spent on updates and validations."""

    @property
    def best_epoch(self) -> int:
        """Epochs completed at the best validation; -1 before the first."""
        return self.best[0][0] if self.best else -1

    @property
    def best_value(self) -> float:
        """evaluation.select_by of the best validation; -1 before the first."""
        return self.best[0][1] if self.best else -1.0


class Header(Section):
    """``state.json`` of a checkpoint."""

    schema_version: int
    progress: Progress
    sha256: dict[str, str]
    """File name to hash."""
    draws: int = 1
    """:data:`DRAWS` of the release that wrote it."""


def drawn_as_now(draws: int, *, on_cpu: bool) -> bool:
    """Whether a release of that :data:`DRAWS` drops out what this one does."""
    return draws == DRAWS or (on_cpu and draws in (3, 4))


def write(
    folder: Path,
    tensors: dict[str, dict[str, Tensor]],
    progress: Progress,
    heartbeat: Callable[[], object] = lambda: None,
) -> None:
    """Write files of tensors with their header, atomically; ``heartbeat`` is called again and
    again.

    Raises:
        CheckpointError: The disk does not take it, or another process has taken the folder over.
    """
    partial, hashes = begin(folder), {}
    try:
        for name, state in tensors.items():
            hashes[name] = write_tensors(partial / name, state, heartbeat)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise not_written(folder, error) from error
    finish(folder, progress, hashes)


def partial_of(folder: Path) -> Path:
    """Where a checkpoint is written before it is complete."""
    return folder.with_name(f"{PARTIAL}{folder.name}")


def begin(folder: Path) -> Path:
    """An empty folder beside ``folder``, to write a checkpoint into.

    Raises:
        CheckpointError: See :func:`write`.
    """
    check_held()
    partial = partial_of(folder)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise not_written(folder, error) from error
    return partial


def finish(folder: Path, progress: Progress, hashes: Mapping[str, str]) -> None:
    """Write the header, when all else is on the disk, and give the checkpoint its name.

    Args:
        folder: The checkpoint's path.
        progress: Where the run stands.
        hashes: Of all files of tensors, which lie in :func:`partial_of` it.

    Raises:
        CheckpointError: See :func:`write`.
    """
    check_held()
    partial = partial_of(folder)
    header = Header(
        schema_version=SCHEMA_VERSION, progress=progress, sha256=dict(hashes), draws=DRAWS
    )
    try:
        (partial / HEADER).write_text(header.model_dump_json(indent=2) + "\n")
        _flush(partial / HEADER)
        _flush(partial)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
        _flush(folder.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise not_written(folder, error) from error


def not_written(folder: Path, error: Exception) -> CheckpointError:
    """What a user is told of a checkpoint that the disk did not take."""
    return CheckpointError(
        f"{folder} could not be written: {error}.",
        rule="The checkpoints before it are as they were.",
        remedy="Make room or check the disk, then start the same command again.",
    )


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_header(folder: Path) -> Header:
    """Header of a checkpoint.

    Raises:
        DamagedError: Missing or unreadable.
        CheckpointError: Of another schema version.
    """
    try:
        header, _ = parse_header(
            (folder / HEADER).read_bytes(),
            Header,
            (SCHEMA_VERSION,),
            what=f"The checkpoint {folder}",
            remedy="Use the mltfr_dist release that wrote it, or train again in another folder.",
            error=CheckpointError,
        )
    except (*NOT_A_FILE, ValueError, RecursionError) as error:
        raise DamagedError(f"{folder} is not a checkpoint: {error}.", remedy=PASSED_OVER) from None
    except OSError as error:
        raise unreadable(folder / HEADER, error) from None
    return header


def read(
    folder: Path,
    name: str = MODEL,
    heartbeat: Callable[[], object] = heartbeat,
    *,
    with_rows: bool = True,
) -> dict[str, Tensor]:
    """Tensors of one file of a checkpoint, its hash verified; ``heartbeat`` is called all along.

    Args:
        folder: The checkpoint.
        name: Of the file.
        heartbeat: Called all along.
        with_rows: Whether rows that ranks have written apart are read too, and put together.

    Raises:
        DamagedError: The file is missing or its content is not what was written.
    """
    (verify_with_rows if with_rows else verify)(folder, name, heartbeat)
    tensors: dict[str, Tensor] = load_file(folder / name)
    if with_rows and (files := row_files(read_header(folder), name)):
        tensors |= assemble(folder, files, heartbeat)
    return tensors


def row_files(header: Header, name: str) -> list[str]:
    """Files of the rows that belong to the file ``name``, where ranks have written these apart."""
    kinds = {MODEL: MODEL_ROWS, OPTIMIZER: OPTIMIZER_ROWS}
    return files_of(kinds[name], header.sha256) if name in kinds else []


def verify(folder: Path, name: str, heartbeat: Callable[[], object] = heartbeat) -> None:
    """Compare a file of a checkpoint with its recorded hash; ``heartbeat`` is called again and
    again.

    Raises:
        DamagedError: The file is missing or its content is not what was written.
    """
    header, path = read_header(folder), folder / name
    try:
        actual = file_sha256(path, heartbeat)
    except NOT_A_FILE:
        actual = "no file"
    except OSError as error:
        raise unreadable(path, error) from None
    if actual != header.sha256.get(name):
        raise DamagedError(
            f"{path} is missing or damaged.",
            rule="Its sha256 must equal the one in state.json.",
            remedy=PASSED_OVER,
        )


def verify_with_rows(folder: Path, name: str, heartbeat: Callable[[], object] = heartbeat) -> None:
    """:func:`verify` of a file, and of the rows that belong to it.

    Raises:
        DamagedError: One is missing or its content is not what was written.
    """
    verify(folder, name, heartbeat)
    for file in row_files(read_header(folder), name):
        verify(folder, file, heartbeat)


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """What is no damage: the file is there, and the system does not hand it out."""
    return CheckpointError(
        f"{path} cannot be read: {error.strerror}.",
        rule="A checkpoint that cannot be read is not passed over: it may be whole.",
        remedy="Check the disk and the permissions, then start the same command again.",
    )


def step_folder(folder: Path, progress: Progress) -> Path:
    """Folder of the checkpoint that a run goes on from."""
    return folder / f"{progress.stage}-step{progress.step:09d}"


def validated_folder(folder: Path, stage: str, epoch: int) -> Path:
    """Folder of the weights after so many epochs, kept for their validation. Each epoch has its
    own: none is overwritten.
    """
    return folder / f"{stage}-best{epoch:05d}"
