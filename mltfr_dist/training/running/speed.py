"""Where rank 0's time goes between two points of TensorBoard, and how much of its peak it uses."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from mltfr_dist.data.stream.training import StepBatches
from mltfr_dist.distributed.engine import Engine
from mltfr_dist.distributed.resources import MatrixWork, matrix_peak


class Speed:
    """Measures steps; none is waited for, for each ends with sums that rank 0 reads anyway.

    The first step after a start is left out, for it warms up; its matrix work is counted. Work per
    real position of the global batch is taken to be the same in every step.
    """

    def __init__(self, engine: Engine, *, active: bool) -> None:
        """Args: engine: What is measured; active: Whether this is rank 0."""
        self.engine, self.active = engine, active
        bf16 = engine.config.training.precision == "bf16"
        dtype = torch.bfloat16 if bf16 else torch.float32
        self.peak = matrix_peak(engine.ranks.device, dtype) if active else 0.0
        self._work: MatrixWork | None = None
        self._flops_per_position = 0.0
        self._waited = 0.0
        self._sums: dict[str, float] = {}

    def waits(self, steps: Iterable[StepBatches]) -> Iterator[StepBatches]:
        """The same steps; notes how long each is waited for."""
        iterator = iter(steps)
        while True:
            start = time.perf_counter()
            batches = next(iterator, None)
            self._waited = time.perf_counter() - start
            if batches is None:
                return
            yield batches

    def counted(self) -> AbstractContextManager[object]:
        """Around the update; counts the matrix work of the first one."""
        if not self.active or self._work is not None:
            return nullcontext()
        self._work = MatrixWork()
        return self._work

    @contextmanager
    def step(self, batches: StepBatches) -> Iterator[None]:
        """Around a whole step, up to where its sums are known."""
        start = time.perf_counter()
        yield
        seconds, phases = time.perf_counter() - start, self.engine.stopwatch.take()
        if self.active and self._work is not None and not self._flops_per_position:
            self._flops_per_position = self._work.flops / batches.num_positions
        elif self.active:
            values = {f"time/{phase}": spent for phase, spent in phases.items()}
            values |= {"time/data": self._waited, "time/step": seconds, "steps": 1.0}
            values["sequences"] = float(batches.num_sequences)
            values["positions"] = float(batches.num_positions)
            self._sums = {key: self._sums.get(key, 0.0) + v for key, v in values.items()}

    def take(self) -> dict[str, float]:
        """What TensorBoard shows of the steps since the last call: seconds a step, rates, share of
        the peak.
        """
        sums, self._sums = self._sums, {}
        steps = sums.pop("steps", 0.0)
        if not steps:
            return {}
        sequences, positions = sums.pop("sequences"), sums.pop("positions")
        total = max(1e-9, sums["time/data"] + sums["time/step"])
        values = {tag: seconds / steps for tag, seconds in sums.items()}
        values["speed/sequences_per_second"] = sequences / total
        if self.peak and self._flops_per_position:
            rate = self._flops_per_position * positions / total
            values["speed/share_of_matrix_peak"] = rate / self.peak
        return values
