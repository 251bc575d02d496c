"""What a training pass gives."""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

from mltfr_dist.models.routing import RoutingSums

Over = Literal["targets", "positions", "sequences"]
"""What a term of the loss is a mean over: scored positions, real positions, or sequences of the
global batch.
"""


class Term(NamedTuple):
    """One term of the loss, as a sum over one micro-batch."""

    sum: Tensor
    """Scalar, with gradient."""
    over: Over
    weight: float


class TrainingOutput(NamedTuple):
    """What one micro-batch gives."""

    terms: dict[str, Term]
    """By name; `loss` is the recommendation loss."""
    routing: RoutingSums | None
    """Over the real positions."""
