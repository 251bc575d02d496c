"""What a run leaves behind while it goes: metrics.jsonl, TensorBoard, and progress on the screen.
Rank 0 only.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from mltfr_dist.config import RunConfig
from mltfr_dist.files import write_atomically
from mltfr_dist.progress import StatusLine, duration, say
from mltfr_dist.training.reporting.board import Board, configuration
from mltfr_dist.training.reporting.services import Service, open_services
from mltfr_dist.training.run_folder import STAGES

METRICS = "metrics.jsonl"
"""In a run's folder."""


QUIET_SECONDS = 30.0
"""Seconds between two progress lines in a log file; a terminal gets one more often, in place."""


class Tracker:
    """Writes a stage's metrics; on ranks other than 0 it does nothing."""

    def __init__(
        self, folder: Path, *, active: bool, stage: str, step: int | None, base_step: int = 0
    ) -> None:
        """Continue the records of ``folder`` at ``step`` of ``stage``.

        Lines written after the checkpoint that the run goes on from are dropped, for they will be
        written again.

        Args:
            folder: The run's folder.
            active: Whether this is rank 0.
            stage: One of :data:`STAGES`.
            step: Updates already made in the stage; None where it starts anew, without a
                checkpoint.
            base_step: Updates of earlier stages: TensorBoard's axis goes on across stages.
        """
        self.active, self.stage, self.base_step = active, stage, base_step
        self._shown, self._started, self._start_step = 0.0, time.monotonic(), step or 0
        self._services: list[Service] = []
        self._anew = step is None
        self._line = StatusLine(sys.stdout, QUIET_SECONDS, say)
        if active:
            path = folder / METRICS
            # a validation may stand at step 0
            drop_later_lines(path, stage, -1 if step is None else step)
            self._file = path.open("a")
            later = STAGES[STAGES.index(stage) + 1 :]
            self._board = Board(folder, stage, step, base_step, later)

    def open_with(self, config: RunConfig) -> None:
        """Show the configuration and the stage's begin, lay out the charts, open
        `tracking.also`.
        """
        if not self.active:
            return
        self._board.open_with(config)
        self.text("configuration", configuration(config), self._start_step + 1)
        self._services = open_services(config, self.stage, anew=self._anew, say=self.say)
        if self._anew:
            number = STAGES.index(self.stage) + 1
            self.text(
                "run/stage",
                f"Stage {number} (`{self.stage}`) begins after update {self.base_step}.",
                0,
            )

    def log(self, kind: str, step: int, values: dict[str, float], **extra: Any) -> None:
        """Write one line and its TensorBoard points.

        Args:
            kind: "step" (training), "valid", "fisher" or "skipped".
            step: Updates made in the stage.
            values: Name to value; names with a slash keep it as TensorBoard's group.
            extra: Further fields of the line.
        """
        if not self.active:
            return
        self._file.write(as_line(kind, self.stage, step, values, **extra))
        self._file.flush()
        self.board(in_groups(kind, values), step)

    def board(self, values: dict[str, float], step: int) -> None:
        """Write TensorBoard points only: what differs from run to run (speed, memory) and would
        blur a comparison.
        """
        if self.active and values:
            self._board.scalars(values, step)
            for service in self._services:
                service.send(values, self.base_step + step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Write a TensorBoard text."""
        if self.active:
            self._board.text(tag, markdown, step)

    def flush(self) -> None:
        """Bring TensorBoard's points to the disk, as before a checkpoint that a run may go on
        from.
        """
        if self.active:
            self._board.flush()

    def progress(self, step: int, total_steps: int, sequences_per_step: int, loss: float) -> None:
        """Show rate and time left: in place on a terminal, now and then in a log file."""
        now = time.monotonic()
        if not self.active or now - self._shown < self._line.pause:
            return
        self._shown = now
        rate = (step - self._start_step) / max(1e-9, now - self._started)
        left = (total_steps - step) / max(1e-9, rate)
        self._line.show(
            f"  {self.stage} step {step}/{total_steps}  loss {loss:.4f}  "
            f"{rate * sequences_per_step:,.0f} sequences/s  at most {duration(left)} left"
        )

    def say(self, message: str) -> None:
        """Print a line of its own."""
        if self.active:
            say(message)

    def close(self) -> None:
        """Flush and close."""
        if self.active:
            self._line.wipe()
            self._file.close()
            self._board.close()
            for service in self._services:
                service.close()


def as_line(kind: str, stage: str, step: int, values: dict[str, float], **extra: Any) -> str:
    """One line of metrics.jsonl."""
    return json.dumps({"kind": kind, "stage": stage, "step": step, **extra, **values}) + "\n"


def in_groups(kind: str, values: dict[str, float]) -> dict[str, float]:
    """Names as TensorBoard groups them."""
    return {name if "/" in name else f"{kind}/{name}": value for name, value in values.items()}


def write_test_line(folder: Path, stage: str, step: int, values: dict[str, float]) -> None:
    """End metrics.jsonl with what the test split gave, once."""
    drop_later_lines(folder / METRICS, stage, step)
    with (folder / METRICS).open("a") as file:
        file.write(as_line("test", stage, step, values))


def drop_later_lines(path: Path, stage: str, step: int) -> None:
    """Keep the lines of earlier stages, and of ``stage`` up to ``step``; a test line only ever ends
    a file.
    """
    if not path.exists():
        return
    kept = []
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue  # cut off when the process was killed; it is written again
        order = STAGES.index(line["stage"]) - STAGES.index(stage)
        if line["kind"] != "test" and (order < 0 or (order == 0 and line["step"] <= step)):
            kept.append(text + "\n")
    write_atomically(path, "".join(kept))
