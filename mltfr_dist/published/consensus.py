"""D12 and D13: the Fisher of a batch's mean loss, a merge that shrinks, and a consensus expert
without dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from mltfr_dist.config import ExpertConfig
from mltfr_dist.data.stream.training import StepBatches
from mltfr_dist.models.consensus import State, check_mergeable
from mltfr_dist.models.experts import ExpertCore
from mltfr_dist.models.output import TrainingOutput
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.models.selectors import Reduce

EPS = 1e-12
"""Added to the sum of Fisher values: where that sum is small, it shrinks the parameters."""


class CoreWithoutDropout(ExpertCore):
    """An expert that has no dropout in training."""

    def __init__(self, config: ExpertConfig, hidden_dim: int, row_dim: int) -> None:
        super().__init__(config, hidden_dim, row_dim)
        self.attention_dropout.p = self.output_dropout.p = 0.0


def merge_unnormalised(cores: list[State], fishers: list[State]) -> State:
    """Sum F theta / (sum F + 1e-12), element by element, of experts of equal shape.

    Args:
        cores: One state per expert, parameter name to tensor.
        fishers: One per expert, the same names and shapes: mean squared gradients, >= 0.

    Raises:
        ValueError: See :func:`check_mergeable`.
    """
    check_mergeable(cores, fishers)
    merged: State = {}
    for name, first in cores[0].items():
        values = torch.stack([core[name].double() for core in cores])
        weight = torch.stack([fisher[name].double() for fisher in fishers])
        merged[name] = ((values * weight).sum(0) / (weight.sum(0) + EPS)).to(first.dtype)
    return merged


def batch_mean_squares(
    model: Recommender,
    steps: Iterable[StepBatches],
    reduce: Reduce,
    heartbeat: Callable[[], object] = lambda: None,
) -> list[State]:
    """The mean over global batches of the squared gradient of the batch's mean loss.

    The batch is the global one: ranks and micro-batches add their gradients before the square.

    Args:
        model: The trained model, whole on every rank; evaluated without dropout.
        steps: This rank's share of each global batch.
        reduce: Adds what ranks have found; every one must call, with as many steps.
        heartbeat: Called at each micro-batch.

    Returns:
        Per expert, parameter name to mean square, the same on every rank.
    """
    assert model.mltfr is not None
    cores = [dict(core.named_parameters()) for core in model.mltfr.cores]
    parameters = [p for core in cores for p in core.values()]
    sums = [torch.zeros_like(p) for p in parameters]
    device = parameters[0].device
    was_training, count = model.training, 0
    model.eval()
    for step in steps:
        totals = [torch.zeros_like(p) for p in parameters]
        for batch in step.micro_batches:
            heartbeat()
            output = model(batch.to(device)._replace(view_ids=None))
            assert isinstance(output, TrainingOutput)
            for total, gradient in zip(
                totals, torch.autograd.grad(output.terms["loss"].sum, parameters), strict=True
            ):
                total += gradient
        for square, total in zip(sums, totals, strict=True):
            square += (reduce.sum(total) / step.num_targets).square()
        count += 1
    model.train(was_training)
    means = iter([square / count for square in sums])
    return [{name: next(means) for name in core} for core in cores]
