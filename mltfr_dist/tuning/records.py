"""A sweep's trials as they lie on disk: `trials/NNNN/` is a run folder, `trials/NNNN.json` its
record.

These files are the truth. Whether a trial is finished, was stopped, failed, or waits to go on is
read from them, so a sweep whose driver was killed at any point goes on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from mltfr_dist.errors import CheckpointError
from mltfr_dist.files import write_atomically
from mltfr_dist.metrics import is_metric
from mltfr_dist.schema import Section
from mltfr_dist.training.run_folder import STAGES, load_result
from mltfr_dist.tuning.space import Values

BASE = "base.yaml"
"""In a sweep's folder: the sweep, and what its trials start from."""

TRIALS, METRICS = "trials", "metrics.jsonl"
VALID = '{"kind": "valid"'
"""How a validation's line begins (training/reporting/tracking.py)."""

DIED = "its process has died (out of memory, or its node was lost)"


class Ended(Section):
    """Why a trial will not go on, though its run is not finished."""

    state: Literal["stopped", "failed"]
    reason: str


class Record(Section):
    """`trials/NNNN.json`."""

    values: Values
    generation: int = 0
    """PBT: times that the trial has taken over another's weights; each generation is a run of its
    own.
    """
    ended: Ended | None = None


@dataclass(frozen=True)
class Validation:
    """One validation of a trial."""

    epoch: int
    """Epochs behind it, over both stages."""
    metrics: dict[str, float]


@dataclass(frozen=True)
class Trial:
    """One trial."""

    sweep: Path
    number: int
    record: Record

    @property
    def name(self) -> str:
        """Its number, with that of its generation from the second on."""
        return f"{self.number:04d}" + (
            f"-{self.record.generation + 1}" if self.record.generation else ""
        )

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.sweep / TRIALS / self.name

    @property
    def values(self) -> Values:
        """Its point of the space: field to value."""
        return self.record.values

    @property
    def state(self) -> Literal["finished", "stopped", "failed", "unfinished"]:
        """What its files say."""
        if load_result(self.folder) is not None:
            return "finished"
        return self.record.ended.state if self.record.ended else "unfinished"

    def validations(self) -> list[Validation]:
        """All validations so far, in order."""
        return read_validations(self.folder / METRICS)

    def best(self, metric: str) -> float | None:
        """The best validation; None before the first."""
        return max((v.metrics[metric] for v in self.validations()), default=None)

    def save(self) -> Trial:
        """Write the record."""
        path = record_path(self.sweep, self.number)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, self.record.model_dump_json(indent=2) + "\n")
        return self

    def end(self, state: Literal["stopped", "failed"], reason: str) -> Trial:
        """Record that it will not go on."""
        return self._changed(ended=Ended(state=state, reason=reason))

    def next_generation(self, values: Values) -> Trial:
        """The trial as it goes on with other values, as another run; not saved yet."""
        return self._with(values=values, generation=self.record.generation + 1)

    def again(self) -> Trial:
        """Record that a trial which failed goes on, from its last checkpoint."""
        self.failure.unlink(missing_ok=True)
        return self._changed(ended=None)

    @property
    def failure(self) -> Path:
        """File in which the last attempt that failed says why."""
        return self.sweep / TRIALS / f"{self.number:04d}.error"

    @property
    def reason(self) -> str:
        """Why the last attempt failed."""
        if self.failure.exists():
            return self.failure.read_text().strip()
        return f"{DIED}; its output is in {self.name}.log"

    def _changed(self, **changes: Any) -> Trial:
        return self._with(**changes).save()

    def _with(self, **changes: Any) -> Trial:
        return replace(self, record=self.record.model_copy(update=changes))


def record_path(sweep: Path, number: int) -> Path:
    """Where the record of a trial lies."""
    return sweep / TRIALS / f"{number:04d}.json"


def group_path(sweep: Path, number: int) -> Path:
    """Where the placement group of a trial's workers is noted while they train."""
    return sweep / TRIALS / f"{number:04d}.group"


def load_trial(sweep: Path, number: int) -> Trial:
    """The trial of that number.

    Raises:
        CheckpointError: Its record is damaged.
    """
    path = record_path(sweep, number)
    try:
        return Trial(sweep, number, Record.model_validate_json(path.read_text()))
    except ValidationError as error:
        raise CheckpointError(
            f"{path} is damaged: {error}.",
            remedy="Delete it and the folder beside it: the trial is run anew.",
        ) from None


def load_trials(sweep: Path) -> list[Trial]:
    """All trials of a sweep, by number.

    Raises:
        CheckpointError: A record is damaged.
    """
    numbers = sorted(int(path.stem) for path in (sweep / TRIALS).glob("[0-9]*.json"))
    return [load_trial(sweep, number) for number in numbers]


def read_validations(path: Path) -> list[Validation]:
    """Validations of a metrics.jsonl; a line that is still being written is left for the next
    time.
    """
    validations: list[Validation] = []
    stage, base, epoch = STAGES[0], 0, 0
    for text in path.read_text().splitlines() if path.exists() else ():
        if not text.startswith(
            VALID
        ):  # the file is read again and again, and nearly all of it are steps
            continue
        try:
            line: dict[str, Any] = json.loads(text)
        except json.JSONDecodeError:
            continue
        if line["stage"] != stage:
            stage, base = line["stage"], epoch
        epoch = base + line["epoch"]
        validations.append(
            Validation(epoch, {name: value for name, value in line.items() if is_metric(name)})
        )
    return validations
