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
from safetensors.torch import load_file, save_file
from torch import Tensor

from mltfr_dist.distributed.engine import Engine
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.distributed.state import (
    begin_moments,
    restore_masters,
    restore_moments,
    whole_moments,
    whole_parameters,
)
from mltfr_dist.distributed.watchdog import beat
from mltfr_dist.errors import CheckpointError, DamagedError
from mltfr_dist.files import file_sha256
from mltfr_dist.schema import Section

SCHEMA_VERSION = 2
HEADER = "state.json"
PARTIAL = ".partial-"
MODEL, MOMENTS = "model.safetensors", "optimizer.safetensors"
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


def save(folder: Path, engine: Engine, progress: Progress, *, with_optimizer: bool = True) -> None:
    """Write a checkpoint to ``folder``, replacing one of that name. All ranks must call; rank 0 writes.

    Raises:
        CheckpointError: A tensor is not finite: what was saved before must not be superseded by it.
    """
    tensors = {MODEL: whole_parameters(engine)}
    if with_optimizer:
        if progress.step == progress.skipped_steps:  # no update yet, so Adam has no moments
            begin_moments(engine)
        tensors[MOMENTS] = whole_moments(engine)
    damaged = nonfinite(tensors, engine.ranks)
    if damaged:
        raise engine.ranks.one_speaks(
            CheckpointError(
                f"Not saved at step {progress.step} of stage `{progress.stage}`: {', '.join(damaged)} "
                f"{'is' if len(damaged) == 1 else 'are'} not finite.",
                rule="A checkpoint holds finite numbers; those saved before are kept.",
                remedy="Lower optimizer.learning_rate or set optimizer.max_grad_norm.",
            )
        )
    engine.ranks.main_works(lambda goes_on: write(folder, tensors, progress, goes_on))


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
    goes_on: Callable[[], object] = lambda: None,
) -> None:
    """Write files of tensors with their header, atomically; ``goes_on`` is called again and again."""
    partial = folder.with_name(f"{PARTIAL}{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    hashes = {}
    for name, state in tensors.items():
        save_file({key: t.contiguous() for key, t in state.items()}, partial / name)
        goes_on()
        hashes[name] = file_sha256(partial / name, goes_on)
    header = Header(schema_version=SCHEMA_VERSION, progress=progress, sha256=hashes)
    (partial / HEADER).write_text(header.model_dump_json(indent=2) + "\n")
    for file in partial.iterdir():
        _flush(file)
        goes_on()
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
    except (FileNotFoundError, ValueError) as error:
        raise DamagedError(
            f"{folder} is not a checkpoint: {error}.",
            remedy="Name a run folder that `train.py` wrote, or train again.",
        ) from None
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
            f"The header of {folder} is damaged: {error}.", remedy="Delete this checkpoint folder."
        ) from None


def read(folder: Path, name: str = MODEL) -> dict[str, Tensor]:
    """Tensors of one file of a checkpoint, its hash verified.

    Raises:
        DamagedError: The file is missing or its content is not what was written.
    """
    verify(folder, name)
    tensors: dict[str, Tensor] = load_file(folder / name)
    return tensors


def verify(folder: Path, name: str, goes_on: Callable[[], object] = beat) -> None:
    """Compare a file of a checkpoint with its recorded hash; ``goes_on`` is called again and again.

    Raises:
        DamagedError: The file is missing or its content is not what was written.
    """
    header, path = read_header(folder), folder / name
    if (
        name not in header.sha256
        or not path.exists()
        or file_sha256(path, goes_on) != header.sha256[name]
    ):
        raise DamagedError(
            f"{path} is missing or damaged.",
            rule="Its sha256 must equal the one in state.json.",
            remedy="Delete this checkpoint folder; the run goes on from the one before it.",
        )


def restore_optimizer(folder: Path, engine: Engine) -> None:
    """Bring a fresh engine, whose module was loaded from ``folder``, to the checkpoint's state. All ranks must call."""
    restore_masters(engine, read(folder))
    progress = read_header(folder).progress
    restore_moments(engine, read(folder, MOMENTS), progress.step - progress.skipped_steps)


def step_folder(folder: Path, progress: Progress) -> Path:
    """Place of the checkpoint that a run goes on from."""
    return folder / f"{progress.stage}-step{progress.step:09d}"


def best_folder(folder: Path, progress: Progress) -> Path:
    """Place of the weights with the best validation so far."""
    return validated_folder(folder, progress.stage, progress.best_epoch)


def validated_folder(folder: Path, stage: str, epoch: int) -> Path:
    """Place of the weights after so many epochs, kept for their validation. Each epoch has its own: none is overwritten."""
    return folder / f"{stage}-best{epoch:05d}"


def latest(folder: Path, stage: str) -> Path | None:
    """Newest checkpoint of a stage; None where there is none."""
    complete = _complete(folder, f"{stage}-step")
    return complete[-1] if complete else None


def latest_intact(
    folder: Path, stage: str, warn: Callable[[str], None], goes_on: Callable[[], object] = beat
) -> Path | None:
    """Newest checkpoint of a stage whose files are what was written.

    Args:
        folder: Of all checkpoints.
        stage: "train" or "consensus".
        warn: Told of those that are damaged.
        goes_on: Called again and again.

    Raises:
        CheckpointError: One is of another schema version.
    """
    for path in reversed(_complete(folder, f"{stage}-step")):
        try:
            verify(path, MODEL, goes_on)
            verify(path, MOMENTS, goes_on)
        except DamagedError as error:
            warn(f"  warning: skipping the checkpoint {path.name}: {error.what}")
        else:
            return path
    return None


def remove_interrupted(folder: Path, warn: Callable[[str], None]) -> None:
    """Delete what a killed process was writing; ``warn`` is told."""
    for partial in sorted(folder.glob(f"{PARTIAL}*")):
        warn(
            f"  warning: the save of {partial.name.removeprefix(PARTIAL)} was interrupted; what there is of it is deleted"
        )
        shutil.rmtree(partial)


def prune(folder: Path, progress: Progress, keep_last: int) -> None:
    """Delete all but the newest ``keep_last`` checkpoints of the stage, and weights that are among the best of none of them."""
    steps = _complete(folder, f"{progress.stage}-step")
    epochs = {epoch for path in steps[-keep_last:] for epoch, _ in read_header(path).progress.best}
    best = {validated_folder(folder, progress.stage, epoch) for epoch in epochs}
    for old in [
        *steps[:-keep_last],
        *(path for path in _complete(folder, f"{progress.stage}-best") if path not in best),
    ]:
        shutil.rmtree(old)


def _complete(folder: Path, prefix: str) -> list[Path]:
    return sorted(path for path in folder.glob(f"{prefix}[0-9]*") if (path / HEADER).exists())
