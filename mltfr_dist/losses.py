"""Training losses: pure functions over the real positions only.

Shapes: N real positions, D hidden size, I items, S negatives a position.
Every loss takes per-position weights and returns a weighted *sum*; who divides by what is the caller's decision, so
that several ranks and micro-batches add up to exactly the mean over the global batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mltfr_dist.numerics import at_least_fp32

CHUNK_ELEMENTS = 1 << 21
"""Logits held at a time by :func:`full_cross_entropy` on a CPU (8 MiB in fp32, so that they stay in its cache)."""

GPU_CHUNK_ELEMENTS = 1 << 26
"""The same on a GPU (256 MiB in fp32), which wants large products."""


class _LinearCrossEntropy(torch.autograd.Function):
    """Softmax cross-entropy of ``hidden @ weight.T`` that never holds more than a chunk of logits.

    The gradient is formed beside the loss while a chunk is at hand: three matrix products, as usual, but one pass over
    the logits in place of four, and memory that does not grow with N * I.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        needs_grad = hidden.requires_grad or weight.requires_grad
        total = at_least_fp32(hidden.new_zeros(()))
        grad_hidden = torch.empty_like(hidden) if needs_grad else hidden
        grad_weight = at_least_fp32(torch.zeros_like(weight)) if needs_grad else weight
        elements = CHUNK_ELEMENTS if hidden.device.type == "cpu" else GPU_CHUNK_ELEMENTS
        rows = max(1, elements // weight.shape[0])
        for start in range(0, hidden.shape[0], rows):
            chunk = slice(start, start + rows)
            target = targets[chunk, None]
            logits = at_least_fp32(hidden[chunk] @ weight.T)  # [n, I]
            logits -= logits.amax(dim=1, keepdim=True)
            target_logits = logits.gather(1, target)
            probabilities = logits.exp_()
            normaliser = probabilities.sum(dim=1, keepdim=True)
            position_weight = weights[chunk, None].to(logits.dtype)
            total += (position_weight * (normaliser.log() - target_logits)).sum()
            if needs_grad:
                probabilities *= position_weight / normaliser
                probabilities.scatter_add_(1, target, -position_weight)
                grad_logits = probabilities.to(hidden.dtype)
                grad_hidden[chunk] = grad_logits @ weight
                grad_weight += grad_logits.T @ hidden[chunk]
        ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad_total,) = grad_outputs
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_total.to(grad_hidden.dtype), grad_weight * grad_total.to(grad_weight.dtype), None, None


def full_cross_entropy(hidden: Tensor, item_vectors: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Softmax cross-entropy over all items.

    Args:
        hidden: [N, D] hidden states of the real positions.
        item_vectors: [I, D] output vectors of items 1..I (no padding row).
        targets: [N] item ids, 1..I.
        weights: [N] weight of each position.

    Returns:
        Scalar, the weighted sum, in fp32 at least.
    """
    result: Tensor = _LinearCrossEntropy.apply(hidden, item_vectors, targets - 1, weights)  # type: ignore[no-untyped-call]
    return result


def binary_cross_entropy(hidden: Tensor, positive_vectors: Tensor, negative_vectors: Tensor, weights: Tensor) -> Tensor:
    """SASRec's loss (Kang and McAuley 2018, eq. 7): the target against sampled negatives, each a binary decision.

    Args:
        hidden: [N, D] hidden states.
        positive_vectors: [N, D] output vectors of the targets.
        negative_vectors: [N, S, D] output vectors of the negatives.
        weights: [N] weight of each position.

    Returns:
        Scalar, the weighted sum, in fp32 at least: -log s(positive) - mean over negatives of log(1 - s(negative)).
    """
    positive = at_least_fp32((hidden * positive_vectors).sum(-1))
    negative = at_least_fp32(torch.einsum("nd,nsd->ns", hidden, negative_vectors))
    losses = F.softplus(-positive) + F.softplus(negative).mean(dim=1)
    return (weights.to(losses.dtype) * losses).sum()
