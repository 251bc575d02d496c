"""Training losses: pure functions over the scored positions only; `mltfr_dist/losses.py` has their
names.

Shapes: N scored positions, D hidden size, I items, S negatives.
Every loss takes per-position weights and returns a weighted *sum*; who divides by what is the
caller's decision, so that several ranks and micro-batches add up to exactly the mean over the
global batch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mltfr_dist.config import LossConfig
from mltfr_dist.errors import ConfigError
from mltfr_dist.models.cross_entropy import full_cross_entropy
from mltfr_dist.models.divided_rows import Division, own_vectors
from mltfr_dist.numerics import at_least_fp32


class Negatives(NamedTuple):
    """Items that all positions share as negatives."""

    item_ids: Tensor
    """[S]."""
    vectors: Tensor
    """[S, D]."""
    log_probability: Tensor
    """[S] log Q: with which probability each was drawn."""


class Scored(NamedTuple):
    """The N scored positions of a micro-batch, and what they are compared with."""

    hidden: Tensor
    """[N, D] hidden states."""
    targets: Tensor
    """[N] item ids, 1..num_items."""
    weights: Tensor
    """[N] weight of each position."""
    embedding: nn.Module
    """Item ids [...] -> output vectors [..., D]."""
    num_items: int
    config: LossConfig
    drawn: Tensor | None = None
    """[N, S] negatives of each position, where the batch holds any."""
    shared: tuple[Tensor, Tensor] | None = None
    """[S] negatives of all positions and their log Q, where the batch holds any."""
    division: Division | None = None
    """How the rows behind ``embedding`` are divided over processes; None: they are not."""

    @property
    def target_vectors(self) -> Tensor:
        """[N, D] output vectors of the targets."""
        return self.embedding(self.targets)  # type: ignore[no-any-return]

    @property
    def item_vectors(self) -> Tensor:
        """[I, D] output vectors of items 1..I: no padding, no mask. Of a table that is not
        divided.
        """
        weight = self.embedding.weight
        assert isinstance(weight, Tensor)
        return weight[1 : self.num_items + 1]

    @property
    def negative_vectors(self) -> Tensor:
        """[N, S, D] output vectors of each position's own negatives.

        Raises:
            ConfigError: The loss's registry line asks for none.
        """
        if self.drawn is None:
            raise self._without("per_position")
        return self.embedding(self.drawn)  # type: ignore[no-any-return]

    @property
    def shared_negatives(self) -> Negatives:
        """The S negatives of all positions.

        Raises:
            ConfigError: The loss's registry line asks for none.
        """
        if self.shared is None:
            raise self._without("shared")
        item_ids, log_probability = self.shared
        return Negatives(item_ids, self.embedding(item_ids), log_probability)

    def _without(self, negatives: str) -> ConfigError:
        name = self.config.name
        return ConfigError(
            f"loss.name={name} reads negatives ({negatives}), and the batch holds none.",
            rule="Batches hold the negatives that a loss's line in mltfr_dist/losses.py asks for.",
            remedy=f'Give the line of `{name}` negatives="{negatives}".',
        )


def binary_cross_entropy(
    hidden: Tensor, positive_vectors: Tensor, negative_vectors: Tensor, weights: Tensor
) -> Tensor:
    """SASRec's loss (Kang and McAuley 2018, eq. 7): the target against sampled negatives, each a
    binary decision.

    Args:
        hidden: [N, D] hidden states.
        positive_vectors: [N, D] output vectors of the targets.
        negative_vectors: [N, S, D] output vectors of the negatives.
        weights: [N] weight of each position.

    Returns:
        Scalar, the weighted sum, in fp32 at least: -log s(positive) - mean over negatives of log(1
        - s(negative)).
    """
    positive = at_least_fp32((hidden * positive_vectors).sum(-1))
    negative = at_least_fp32(torch.einsum("nd,nsd->ns", hidden, negative_vectors))
    losses = F.softplus(-positive) + F.softplus(negative).mean(dim=1)
    return (weights.to(losses.dtype) * losses).sum()


def generalised_binary_cross_entropy(
    hidden: Tensor,
    positive_vectors: Tensor,
    negative_vectors: Tensor,
    weights: Tensor,
    *,
    num_items: int,
    calibration: float,
) -> Tensor:
    """The gBCE loss (Petrov and Macdonald 2023, arXiv 2308.07192): BCE whose positive is tempered,
    against overconfidence.

    With S of I - 1 negatives sampled, alpha = S / (I - 1) and beta = 1 - t (1 - alpha); s(positive)
    is raised to beta.

    Args:
        hidden: [N, D] hidden states.
        positive_vectors: [N, D] output vectors of the targets.
        negative_vectors: [N, S, D] output vectors of the negatives.
        weights: [N] weight of each position.
        num_items: I.
        calibration: t. 0 leaves BCE over S + 1 decisions; 1 makes the scores calibrated
            probabilities.

    Returns:
        Scalar, the weighted sum, in fp32 at least, of the mean over the S + 1 decisions.
    """
    count = negative_vectors.shape[1]
    beta = 1 - calibration * (1 - min(1.0, count / max(1, num_items - 1)))
    positive = at_least_fp32((hidden * positive_vectors).sum(-1))
    negative = at_least_fp32(torch.einsum("nd,nsd->ns", hidden, negative_vectors))
    losses = (beta * F.softplus(-positive) + F.softplus(negative).sum(dim=1)) / (count + 1)
    return (weights.to(losses.dtype) * losses).sum()


def sampled_softmax(
    hidden: Tensor, targets: Tensor, target_vectors: Tensor, negatives: Negatives, weights: Tensor
) -> Tensor:
    """Softmax over the target and sampled items, with the logQ correction (Bengio and Senecal 2008;
    Yi et al. 2019).

    A negative's logit is lowered by log(S Q), its expected count, so that the sum of exponentials
    estimates that over all items without bias; where a negative is the position's own target it is
    left out. The target is there with certainty, so its logit stands as it is (Khrylchenko et al.
    2025).

    Args:
        hidden: [N, D] hidden states.
        targets: [N] item ids.
        target_vectors: [N, D] their output vectors.
        negatives: The S negatives.
        weights: [N] weight of each position.

    Returns:
        Scalar, the weighted sum, in fp32 at least. Every item once, with Q = 1 / I, gives the full
        cross-entropy.
    """
    positive = at_least_fp32((hidden * target_vectors).sum(-1))  # [N]
    logits = at_least_fp32(hidden @ negatives.vectors.T)  # [N, S]
    logits = logits - (negatives.log_probability + math.log(max(1, len(negatives.item_ids)))).to(
        logits.dtype
    )
    logits = logits.masked_fill(targets[:, None] == negatives.item_ids, -torch.inf)
    losses = torch.logsumexp(torch.cat([positive[:, None], logits], dim=1), dim=1) - positive
    return (weights.to(losses.dtype) * losses).sum()


# --- by the names of the registry ----------------------------------------------------------------


def all_items(scored: Scored) -> Tensor:
    """:func:`full_cross_entropy`, wherever the items' rows are held."""
    if scored.division is not None:
        own = own_vectors(scored.embedding)
        return scored.division.cross_entropy(
            scored.hidden, own, scored.targets, scored.weights, scored.num_items
        )
    table = scored.embedding.weight
    assert isinstance(table, Tensor)
    items = slice(1, scored.num_items + 1)
    return full_cross_entropy(scored.hidden, table, scored.targets, scored.weights, items)


def shared_items(scored: Scored) -> Tensor:
    """:func:`sampled_softmax`."""
    negatives = scored.shared_negatives
    return sampled_softmax(
        scored.hidden, scored.targets, scored.target_vectors, negatives, scored.weights
    )


def sampled_items(scored: Scored) -> Tensor:
    """:func:`binary_cross_entropy`."""
    negatives = scored.negative_vectors
    return binary_cross_entropy(scored.hidden, scored.target_vectors, negatives, scored.weights)


def tempered_items(scored: Scored) -> Tensor:
    """:func:`generalised_binary_cross_entropy`."""
    negatives = scored.negative_vectors
    return generalised_binary_cross_entropy(
        scored.hidden,
        scored.target_vectors,
        negatives,
        scored.weights,
        num_items=scored.num_items,
        calibration=scored.config.calibration,
    )
