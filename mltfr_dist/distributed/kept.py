"""A run's checkpoints: the newest to go on from, the best to choose, and those that may go."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from mltfr_dist.distributed.checkpoint import (
    HEADER,
    MODEL,
    OPTIMIZER,
    PARTIAL,
    Progress,
    read_header,
    validated_folder,
    verify_with_rows,
)
from mltfr_dist.distributed.watchdog import heartbeat
from mltfr_dist.errors import CheckpointError, DamagedError

Warn = Callable[[str], None]
GoesOn = Callable[[], object]


class Choice(NamedTuple):
    """Weights of a run, by where they lie."""

    name: str
    """Of the checkpoint's folder."""
    stage: str
    epoch: int
    """Epochs of the stage behind it."""
    value: float | None
    """NDCG@10 of its validation; None where it is not known."""

    @property
    def figure(self) -> str:
        """As a log says it."""
        known = "not recorded" if self.value is None else f"{self.value:.4f}"
        return f"{self.name} (validation NDCG@10 {known})"


def latest(folder: Path, stage: str) -> Path | None:
    """Newest checkpoint of a stage; None where there is none."""
    complete = _complete(folder, f"{stage}-step")
    return complete[-1] if complete else None


def latest_intact(
    folder: Path, stage: str, warn: Warn, heartbeat: GoesOn = heartbeat
) -> Path | None:
    """Newest checkpoint of a stage whose files are what was written.

    Args:
        folder: Of all checkpoints.
        stage: "train" or "consensus".
        warn: Told of those that are damaged.
        heartbeat: Called again and again.

    Raises:
        CheckpointError: One is of another schema version.
    """
    for path in reversed(_complete(folder, f"{stage}-step")):
        try:
            verify_with_rows(path, MODEL, heartbeat)
            verify_with_rows(path, OPTIMIZER, heartbeat)
        except DamagedError as error:
            warn(f"  warning: skipping the checkpoint {path.name}: {error.what}")
        else:
            return path
    return None


def best_intact(
    folder: Path, outcomes: Mapping[str, Progress], warn: Warn, heartbeat: GoesOn = heartbeat
) -> Choice:
    """The best validated weights, or where these are damaged or gone the next best, or the last.

    Args:
        folder: Of all checkpoints.
        outcomes: Stage to where it ended, in order; of equal validations the later stage's win.
        warn: Told what is chosen in place of better weights, and what both figures are.
        heartbeat: Called again and again.

    Raises:
        CheckpointError: None is whole.
    """
    stages = list(outcomes)
    ranked = [c for stage in stages for c in _validated(folder, outcomes[stage])]
    ranked.sort(key=lambda c: (-(c.value or 0.0), -stages.index(c.stage), c.epoch))
    for choice in ranked:
        for name in (choice.name, *_same_weights(folder, choice)):
            if _is_whole(folder / name, heartbeat):
                intact = choice._replace(name=name)
                if intact != ranked[0]:
                    _tell(warn, ranked[0], intact)
                return intact
    for stage in reversed(stages):
        last = latest_intact(folder, stage, warn, heartbeat)
        if last is not None:
            intact = Choice(last.name, stage, read_header(last).progress.epoch, None)
            if ranked:
                _tell(warn, ranked[0], intact)
            return intact
    raise CheckpointError(
        f"No checkpoint in {folder} is whole.",
        rule="A run's model is read from one of its checkpoints.",
        remedy=f"Restore the folder from a copy, or delete {folder} and start the same command "
        "again: the run then begins anew.",
    )


def _tell(warn: Warn, best: Choice, choice: Choice) -> None:
    same = (best.stage, best.epoch) == (choice.stage, choice.epoch) and choice.value is not None
    warn(
        f"  warning: the best checkpoint {best.figure} is missing or damaged: "
        + (
            f"{choice.name} holds the same weights and stands for it"
            if same
            else f"{choice.figure} is the best that is left, and takes its place"
        )
    )


def _validated(folder: Path, progress: Progress) -> list[Choice]:
    """Every validation of a stage whose weights were kept, also those that a later one outdid."""
    values = dict(progress.best)
    for path in _complete(folder, f"{progress.stage}-best"):
        with suppress(DamagedError):  # its figure is then unknown, or stands in `progress`
            kept = read_header(path).progress
            own = dict(kept.best).get(kept.epoch, math.inf)
            if kept.epoch <= progress.epoch and own <= progress.best_value:
                values.setdefault(kept.epoch, own)
    return [
        Choice(validated_folder(folder, progress.stage, epoch).name, progress.stage, epoch, value)
        for epoch, value in values.items()
    ]


def _same_weights(folder: Path, choice: Choice) -> list[str]:
    """Checkpoints of the end of the same epoch, which hold the weights that were validated."""
    names = []
    for path in _complete(folder, f"{choice.stage}-step"):
        with suppress(DamagedError):
            progress = read_header(path).progress
            if (progress.epoch, progress.step_in_epoch) == (choice.epoch, 0):
                names.append(path.name)
    return names


def _is_whole(path: Path, heartbeat: GoesOn) -> bool:
    try:
        verify_with_rows(path, MODEL, heartbeat)
    except DamagedError:
        return False
    return True


def remove_interrupted(folder: Path, warn: Warn) -> None:
    """Delete what a killed process was writing; ``warn`` is told."""
    for partial in sorted(folder.glob(f"{PARTIAL}*")):
        warn(
            f"  warning: the save of {partial.name.removeprefix(PARTIAL)} was interrupted; "
            "what there is of it is deleted"
        )
        shutil.rmtree(partial)


def prune(folder: Path, progress: Progress, keep_last: int) -> None:
    """Delete what the checkpoint that was just saved supersedes.

    What stays: the stage's newest ``keep_last`` checkpoints up to that one, and the weights that
    are among the best of any of them. Later ones are leftovers that were damaged: the run comes by
    again, and they count for nothing.
    """
    steps = [
        path
        for path in _complete(folder, f"{progress.stage}-step")
        if _number(path) <= progress.step
    ]
    epochs = {epoch for epoch, _ in progress.best}
    for path in steps[-keep_last:]:
        with suppress(DamagedError):  # then it cannot be gone on from, and nothing is kept for it
            epochs |= {epoch for epoch, _ in read_header(path).progress.best}
    best = {validated_folder(folder, progress.stage, epoch) for epoch in epochs}
    for old in [
        *steps[:-keep_last],
        *(path for path in _complete(folder, f"{progress.stage}-best") if path not in best),
    ]:
        shutil.rmtree(old)


def _number(path: Path) -> int:
    return int(path.name.rpartition("-step")[2])


def _complete(folder: Path, prefix: str) -> list[Path]:
    return sorted(path for path in folder.glob(f"{prefix}[0-9]*") if (path / HEADER).exists())
