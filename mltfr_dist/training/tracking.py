"""What a run leaves behind while it goes: metrics.jsonl, TensorBoard, and progress on the screen. Rank 0 only."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mltfr_dist.progress import StatusLine, duration, say

STAGES = ("train", "consensus")
"""Stages of a run in order: the bare model or stage 1, then stage 2."""

QUIET_SECONDS = 30.0
"""Seconds between two progress lines in a log file; a terminal gets one more often, in place."""


class Tracker:
    """Writes a stage's metrics; on ranks other than 0 it does nothing."""

    def __init__(
        self, folder: Path, *, active: bool, stage: str, step: int | None, base_step: int = 0
    ) -> None:
        """Continue the records of ``folder`` at ``step`` of ``stage``.

        Lines written after the checkpoint that the run goes on from are dropped, for they will be written again.

        Args:
            folder: The run's folder.
            active: Whether this is rank 0.
            stage: One of :data:`STAGES`.
            step: Updates already made in the stage; None where it starts anew, without a checkpoint.
            base_step: Updates of earlier stages: TensorBoard's axis goes on across stages.
        """
        self.active, self.stage, self.base_step = active, stage, base_step
        self._shown, self._started, self._start_step = 0.0, time.monotonic(), step or 0
        self._line = StatusLine(sys.stdout, QUIET_SECONDS, say)
        if active:
            from torch.utils.tensorboard import SummaryWriter

            self._path = folder / "metrics.jsonl"
            drop_later_lines(
                self._path, stage, -1 if step is None else step
            )  # a validation may stand at step 0
            self._file = self._path.open("a")
            self._board = SummaryWriter(str(folder / "tb"), purge_step=base_step + (step or 0) + 1)

    def log(self, kind: str, step: int, values: dict[str, float], **extra: Any) -> None:
        """Write one line and its TensorBoard points.

        Args:
            kind: "step" (training), "valid", "fisher" or "test".
            step: Updates made in the stage.
            values: Name to value; names with a slash keep it as TensorBoard's group.
            extra: Further fields of the line.
        """
        if not self.active:
            return
        line = {"kind": kind, "stage": self.stage, "step": step, **extra, **values}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self.board(
            {name if "/" in name else f"{kind}/{name}": value for name, value in values.items()},
            step,
        )

    def board(self, values: dict[str, float], step: int) -> None:
        """Write TensorBoard points only: what differs from run to run (speed, memory) and would blur a comparison."""
        if self.active:
            for tag, value in values.items():
                self._board.add_scalar(tag, value, self.base_step + step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        """Write a TensorBoard text."""
        if self.active:
            self._board.add_text(tag, markdown, self.base_step + step)

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


def drop_later_lines(path: Path, stage: str, step: int) -> None:
    """Keep the lines of earlier stages, and of ``stage`` up to ``step``; a test line only ever ends a file."""
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
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    partial.rename(path)


def seed_all(*keys: int) -> None:
    """Seed torch from integer keys (seed, stage, step, rank): random state is a function, never saved."""
    from mltfr_dist.data.negatives import hash_u64

    torch.manual_seed(int(hash_u64(*keys) >> 1))
