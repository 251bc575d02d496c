"""Training losses: pure functions over the scored positions only; `mltfr_dist/losses.py` has their
names.

Shapes: N scored positions, D hidden size, I items, S negatives, P sequences.
Every loss takes per-position weights and returns a weighted *sum*; who divides by what is the
caller's decision, so that several ranks and micro-batches add up to exactly the mean over the
global batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mltfr_dist.losses import LOSSES
from mltfr_dist.models.cross_entropy import full_cross_entropy
from mltfr_dist.models.divided_rows import division_of, own_vectors
from mltfr_dist.models.packing import indices_where
from mltfr_dist.models.scored import Negatives, Scored
from mltfr_dist.numerics import at_least_fp32
from mltfr_dist.registry import load


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


def loss_sum(scored: Scored) -> Tensor:
    """The weighted sum of the loss that the configuration names; whoever divides, divides by the
    global batch's count.
    """
    result: Tensor = load(LOSSES[scored.config.name].path, "mltfr_dist.models")(scored)
    return result


def all_items(scored: Scored) -> Tensor:
    """:func:`full_cross_entropy`, wherever the items' rows are held."""
    table = scored.embedding
    if (division := division_of(table)) is not None:
        own = own_vectors(table)
        return division.cross_entropy(
            scored.hidden, own, scored.targets, scored.weights, scored.num_items
        )
    return full_cross_entropy(scored.hidden, scored.item_vectors, scored.targets, scored.weights)


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


# --- beside the recommendation loss
# ------------------------------------------------------------------


def contrastive(
    first: Tensor,
    second: Tensor,
    present: Tensor,
    *,
    group_size: int,
    temperature: float,
    num_present: int | None = None,
) -> Tensor:
    """NT-Xent over two views of each sequence (Chen et al. 2020; CL4SRec, Xie et al. 2022), in
    groups.

    A view's positive is the other view of its sequence; its negatives are all views of the other
    sequences of its group. Groups, and not the whole batch, so that the sum does not depend on how
    ranks and micro-batches divide the batch.

    Args:
        first: [P, D] representations of the first views; consecutive ``group_size`` rows are a
            group.
        second: [P, D] of the second views.
        present: [P] bool, False for a row that only fills the batch.
        group_size: Sequences of a group; divides P.
        temperature: Products are divided by it.
        num_present: How many rows are present, where it is known.

    Returns:
        Scalar, in fp32 at least: the sum over present sequences of the mean of both views' losses.
    """
    views = torch.stack([first, second], dim=1)  # [P, 2, D]
    views = views.reshape(-1, 2 * group_size, views.shape[-1])  # [P / g, 2 g, D]
    here = present.repeat_interleave(2).view(views.shape[:2])  # [P / g, 2 g]
    logits = at_least_fp32(views @ views.transpose(1, 2)) / temperature
    numbers = torch.arange(2 * group_size, device=first.device)
    itself = numbers[:, None] == numbers
    logits = logits.masked_fill(itself | ~here[:, None, :], -torch.inf)
    other = (numbers ^ 1).expand(views.shape[:2])  # views 2i and 2i + 1 belong together
    num_kept = None if num_present is None else 2 * num_present  # each has its positive
    kept = indices_where(here, num_kept)
    kept_logits, kept_other = (
        t.flatten(0, 1).index_select(0, kept) for t in (logits, other[..., None])
    )
    losses = torch.logsumexp(kept_logits, dim=1) - kept_logits.gather(1, kept_other)[:, 0]
    return losses.sum() / 2
