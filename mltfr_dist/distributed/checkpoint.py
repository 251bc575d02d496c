"""Checkpoints: whole tensors in safetensors and a JSON header. No pickle; complete or absent, never half.

A checkpoint is a folder, written beside its place and renamed into it. Learning rate, dropout, negatives and data order
are functions of (seed, stage, step), so beside tensors the state is a few numbers, and the same at any world size.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mltfr_dist.distributed.engine import Engine
from mltfr_dist.distributed.lock import check_held
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.distributed.sending import send_tensors, send_text
from mltfr_dist.distributed.state import (
    begin_optimizer_state,
    restore_masters,
    restore_optimizer_state,
    whole_optimizer_state,
    whole_parameters,
)
from mltfr_dist.distributed.watchdog import heartbeat
from mltfr_dist.errors import CheckpointError, DamagedError
from mltfr_dist.files import file_sha256, save_tensors
from mltfr_dist.schema import Section

SCHEMA_VERSION = 3
DRAWS = 2
"""Of dropout: 1, by torch's generator; 2, on a CPU by `models/dropout.py`."""
HEADER = "state.json"
PARTIAL = ".partial-"
MODEL, OPTIMIZER = "model.safetensors", "optimizer.safetensors"
PASSED_OVER = "Start the run's command again: it passes over what is damaged."
NOT_A_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
CHECKED_ELEMENTS = 1 << 24
"""Numbers looked at together, so that a check needs no memory of a tensor's size."""


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


def save(folder: Path, engine: Engine, progress: Progress, *, with_optimizer: bool = True) -> None:
    """Write a checkpoint to ``folder``, replacing one of that name. All ranks must call; rank 0 writes.

    Raises:
        CheckpointError: A tensor is not finite: what was saved before must not be superseded by it.
    """
    tensors = {MODEL: whole_parameters(engine)}
    if with_optimizer:
        if progress.step == progress.skipped_steps:  # no update yet, so the optimizer has no state
            begin_optimizer_state(engine)
        tensors[OPTIMIZER] = whole_optimizer_state(engine)
    damaged = nonfinite(tensors, engine.ranks)
    if damaged:
        raise engine.ranks.rank0_raises(
            CheckpointError(
                f"Not saved at step {progress.step} of stage `{progress.stage}`: {', '.join(damaged)} "
                f"{'is' if len(damaged) == 1 else 'are'} not finite.",
                rule="A checkpoint holds finite numbers; those saved before are kept.",
                remedy="Lower optimizer.learning_rate or set optimizer.max_grad_norm.",
            )
        )
    engine.ranks.on_rank0(lambda heartbeat: write(folder, tensors, progress, heartbeat))


def nonfinite(tensors: dict[str, dict[str, Tensor]], ranks: Ranks) -> list[str]:
    """Names of the tensors that are not finite on some rank, each looked at in parts. All ranks must call."""
    named = [(name, t) for state in tensors.values() for name, t in state.items()]
    found = [
        any(not torch.isfinite(part).all() for part in torch.split(t.flatten(), CHECKED_ELEMENTS))
        for _, t in named
    ]
    return [
        name
        for (name, _), bad in zip(
            named, ranks.max(torch.tensor(found).float()).tolist(), strict=True
        )
        if bad
    ]


def write(
    folder: Path,
    tensors: dict[str, dict[str, Tensor]],
    progress: Progress,
    heartbeat: Callable[[], object] = lambda: None,
) -> None:
    """Write files of tensors with their header, atomically; ``heartbeat`` is called again and again.

    Raises:
        CheckpointError: The disk does not take it, or another process has taken the folder over.
    """
    check_held()
    partial = folder.with_name(f"{PARTIAL}{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write(folder, partial, tensors, progress, heartbeat)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"{folder} could not be written: {error}.",
            rule="The checkpoints before it are as they were.",
            remedy="Make room or check the disk, then start the same command again.",
        ) from error


def _write(
    folder: Path,
    partial: Path,
    tensors: dict[str, dict[str, Tensor]],
    progress: Progress,
    heartbeat: Callable[[], object],
) -> None:
    partial.mkdir(parents=True)
    hashes = {}
    for name, state in tensors.items():
        save_tensors(state, partial / name)
        heartbeat()
        hashes[name] = file_sha256(partial / name, heartbeat)
    header = Header(schema_version=SCHEMA_VERSION, progress=progress, sha256=hashes, draws=DRAWS)
    (partial / HEADER).write_text(header.model_dump_json(indent=2) + "\n")
    for file in partial.iterdir():
        _flush(file)
        heartbeat()
    _flush(partial)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    _flush(folder.parent)


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
        content: Any = json.loads((folder / HEADER).read_text())
    except (*NOT_A_FILE, ValueError) as error:
        raise DamagedError(f"{folder} is not a checkpoint: {error}.", remedy=PASSED_OVER) from None
    except OSError as error:
        raise unreadable(folder / HEADER, error) from None
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise CheckpointError(
            f"The checkpoint {folder} has schema version {version}; this program reads version {SCHEMA_VERSION}.",
            remedy="Use the mltfr_dist release that wrote it, or train again in another folder.",
        )
    try:
        return Header.model_validate(content)
    except ValidationError as error:
        raise DamagedError(
            f"The header of {folder} is damaged: {error}.", remedy=PASSED_OVER
        ) from None


def read(
    folder: Path, name: str = MODEL, heartbeat: Callable[[], object] = heartbeat
) -> dict[str, Tensor]:
    """Tensors of one file of a checkpoint, its hash verified; ``heartbeat`` is called all along.

    Raises:
        DamagedError: The file is missing or its content is not what was written.
    """
    verify(folder, name, heartbeat)
    tensors: dict[str, Tensor] = load_file(folder / name)
    return tensors


def read_for_all(folder: Path, ranks: Ranks, name: str = MODEL) -> dict[str, Tensor]:
    """:func:`read` on rank 0, which sends what it has read to the others. All ranks must call.

    Raises:
        DamagedError: The file is missing or its content is not what was written.
    """
    return send_tensors(ranks.on_rank0(lambda heartbeat: read(folder, name, heartbeat)), ranks)


def progress_for_all(folder: Path, ranks: Ranks) -> Progress:
    """Where the checkpoint ``folder`` stands, as rank 0 reads it. All ranks must call.

    Raises:
        DamagedError: The header is missing or unreadable.
    """
    header = ranks.on_rank0(lambda _: read_header(folder))
    return Progress.model_validate_json(
        send_text(header.progress.model_dump_json() if header else None, ranks)
    )


def verify(folder: Path, name: str, heartbeat: Callable[[], object] = heartbeat) -> None:
    """Compare a file of a checkpoint with its recorded hash; ``heartbeat`` is called again and again.

    Raises:
        DamagedError: The file is missing or its content is not what was written.
    """
    header, path = read_header(folder), folder / name
    try:
        found = file_sha256(path, heartbeat)
    except NOT_A_FILE:
        found = "no file"
    except OSError as error:
        raise unreadable(path, error) from None
    if found != header.sha256.get(name):
        raise DamagedError(
            f"{path} is missing or damaged.",
            rule="Its sha256 must equal the one in state.json.",
            remedy=PASSED_OVER,
        )


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """What is no damage: the file is there, and the system does not hand it out."""
    return CheckpointError(
        f"{path} cannot be read: {error.strerror}.",
        rule="A checkpoint that cannot be read is not passed over: it may be whole.",
        remedy="Check the disk and the permissions, then start the same command again.",
    )


def restore_optimizer(folder: Path, engine: Engine) -> None:
    """Bring a fresh engine, whose module was loaded from ``folder``, to the checkpoint's state. All ranks must call."""
    restore_masters(engine, read_for_all(folder, engine.ranks))
    progress = progress_for_all(folder, engine.ranks)
    state = read_for_all(folder, engine.ranks, OPTIMIZER)
    restore_optimizer_state(engine, state, progress.step - progress.skipped_steps)


def step_folder(folder: Path, progress: Progress) -> Path:
    """Place of the checkpoint that a run goes on from."""
    return folder / f"{progress.stage}-step{progress.step:09d}"


def validated_folder(folder: Path, stage: str, epoch: int) -> Path:
    """Place of the weights after so many epochs, kept for their validation. Each epoch has its own: none is overwritten."""
    return folder / f"{stage}-best{epoch:05d}"
