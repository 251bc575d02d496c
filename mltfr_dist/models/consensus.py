"""The Fisher-weighted consensus expert (Matena and Raffel 2022; MLTFR section on consensus).

theta_C = sum_m F_m theta_m / sum_m F_m, element by element, over the experts' cores.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

NEGLIGIBLE = 1e-10
"""A summed, trace-normalised Fisher below this share of its mean carries no information."""

State = dict[str, Tensor]


def merge(cores: list[State], fishers: list[State]) -> State:
    """Fisher-weighted mean of experts of equal shape.

    Each expert's Fisher is first divided by its own mean, for its scale follows the gate and not
    the knowledge; where no expert has any (a key's bias never has), the plain mean stands.

    Args:
        cores: One state per expert, parameter name to tensor.
        fishers: One per expert, the same names and shapes: mean squared gradients, >= 0.

    Returns:
        Parameter name to merged tensor, in the cores' format. Equal cores merge to themselves.

    Raises:
        ValueError: See :func:`check_mergeable`.
    """
    check_mergeable(cores, fishers)
    weights = [divided_by_mean(fisher) for fisher in fishers]
    merged: State = {}
    for name, first in cores[0].items():
        values = torch.stack([core[name].double() for core in cores])
        weight = torch.stack([w[name].double() for w in weights])
        total, weighted = weight.sum(0), (values * weight).sum(0)
        informed = total > NEGLIGIBLE
        mean = torch.where(informed, weighted / torch.where(informed, total, 1.0), values.mean(0))
        merged[name] = mean.to(first.dtype)
    return merged


def check_mergeable(cores: list[State], fishers: list[State]) -> None:
    """Whether experts can be averaged.

    Raises:
        ValueError: No expert, names or shapes differ, or a Fisher value is not finite.
    """
    if not cores or len(cores) != len(fishers):
        raise ValueError(
            f"merge needs as many Fishers as cores, and at least one ({len(cores)} cores, "
            f"{len(fishers)} Fishers)"
        )
    shapes = [{name: tuple(t.shape) for name, t in state.items()} for state in cores + fishers]
    if any(s != shapes[0] for s in shapes):
        raise ValueError(
            "experts to merge, and their Fishers, must have equal parameter names and shapes"
        )
    if not all(bool(torch.isfinite(t).all()) for fisher in fishers for t in fisher.values()):
        raise ValueError("a Fisher value is not finite: the experts it comes from have diverged")


def divided_by_mean(fisher: State) -> State:
    """A Fisher diagonal of mean 1 over all its elements, float64 (all zero where it is zero)."""
    elements = sum(t.numel() for t in fisher.values())
    mean = (
        sum((t.double().sum() for t in fisher.values()), torch.zeros((), dtype=torch.float64))
        / elements
    )
    return {
        name: t.double() / mean.clamp(min=torch.finfo(torch.float64).tiny)
        for name, t in fisher.items()
    }


def freeze(module: nn.Module) -> None:
    """Turn every parameter of ``module`` into a buffer of the same name.

    No optimizer, division of parameters or gradient hook ever sees a buffer: the consensus expert
    cannot drift, and needs no gathering.
    """
    for child in module.modules():
        for name, parameter in list(child.named_parameters(recurse=False)):
            delattr(child, name)
            child.register_buffer(name, parameter.detach().clone())
