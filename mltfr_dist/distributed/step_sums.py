"""A step's outputs as one vector, which ranks add up in one message beside what they agree on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mltfr_dist.models.output import TrainingOutput
from mltfr_dist.models.routing import RoutingSums


class StepSums:
    """The sums of a step's micro-batches, in one order on every rank."""

    def __init__(self, outputs: Sequence[TrainingOutput]) -> None:
        """Args: outputs: of the micro-batches, at least one."""
        self._first = outputs[0]
        self._sums: dict[str, Tensor] = {}
        for output in outputs:
            sums = {name: term.sum.detach().view(1) for name, term in output.terms.items()}
            sums |= {} if output.routing is None else output.routing._asdict()
            for name, value in sums.items():
                held = self._sums.get(name)
                self._sums[name] = value.double() if held is None else held + value.double()

    @property
    def vector(self) -> Tensor:
        """[S] float64, where the outputs are."""
        return torch.cat(list(self._sums.values()))

    def output(self, vector: Tensor) -> TrainingOutput:
        """The output that a vector [S] of such sums stands for, without gradient."""
        sums = torch.split(vector, [len(value) for value in self._sums.values()])
        reduced = dict(zip(self._sums, sums, strict=True))
        terms = {
            name: term._replace(sum=reduced[name][0]) for name, term in self._first.terms.items()
        }
        if self._first.routing is None:
            return TrainingOutput(terms, None)
        return TrainingOutput(terms, RoutingSums(*(reduced[f] for f in RoutingSums._fields)))
