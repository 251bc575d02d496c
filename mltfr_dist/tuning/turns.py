"""After which epochs the trials of a population pause and are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mltfr_dist.config import RunConfig
from mltfr_dist.tuning.records import Validation
from mltfr_dist.tuning.space import SweepConfig


def most_epochs(base: RunConfig) -> int:
    """Epochs of a trial that nothing stops, over both stages."""
    second = base.mltfr.enabled and base.mltfr.consensus.enabled
    return base.training.epochs + (base.training.consensus_epochs if second else 0)


@dataclass(frozen=True)
class Turns:
    """A turn ends with the first validation after ``every`` more epochs; the last one with the
    trial, so that nothing is exchanged when nobody trains with it any more.
    """

    every: int
    most: int
    """Epochs of a trial that nothing stops."""

    @classmethod
    def of(cls, sweep: SweepConfig, base: RunConfig) -> Turns:
        """A sweep's; without exchanges a trial has one turn."""
        most = most_epochs(base)
        return cls(sweep.pbt.every_epochs if sweep.scheduler == "pbt" else most + 1, most)

    def end_after(self, epochs: int) -> int | None:
        """Where the turn ends that begins after ``epochs``; None: with the trial."""
        end = (epochs // self.every + 1) * self.every
        return end if end < self.most else None

    def end_at(self, epochs: int) -> int | None:
        """The same, for the turn that ``epochs`` lies in or ends."""
        return self.end_after(max(0, epochs - 1))

    def ended(self, validations: Sequence[Validation]) -> bool:
        """Whether the last of them ended a turn."""
        before, last = (0, 0, *(v.epoch // self.every for v in validations))[-2:]
        return last > before
