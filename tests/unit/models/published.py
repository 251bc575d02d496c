"""The published method, stated plainly: a reference to compare an implementation with, tensor for
tensor.

It follows the released procedure, its faults included, and imports nothing of what it is to judge.
Everything is float64 and differentiable by autograd; there is no dropout. B users, L positions, D
hidden size, V tokens of width D_m in a table, K kept tokens, M tables. Linear maps are a weight
[out, in] and a bias [out]."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def user_vectors(x: Tensor, valid: Tensor) -> Tensor:
    """The mean of all of a user's real positions, later ones included: [B, L, D], bool [B, L] ->
    [B, D].

    Every user needs a real position; one with none gets NaN.
    """
    return torch.stack([x[b, valid[b]].mean(0) for b in range(len(x))])


def gumbel(uniform: Tensor) -> Tensor:
    """Gumbel(0, 1) noise of U in [0, 1), of the same shape."""
    eps = 1e-10
    return -torch.log(-torch.log(uniform + eps) + eps)


def kept(
    u: Tensor, table: Tensor, weight: Tensor, bias: Tensor, noise: Tensor, tau: float, k: int
) -> tuple[Tensor, Tensor]:
    """The user-guided token filter with straight-through weights.

    Args:
        u: User vectors, [B, D].
        table: [V, D_m].
        weight: Maps tokens to the hidden space, [D, D_m].
        bias: [D].
        noise: Gumbel noise, [B, V].
        tau: Temperature of the softmax.
        k: Number of tokens to keep.

    Returns:
        Ids [B, K], the most probable first, and their weights [B, K]. A weight's value is 1 / (K +
        1e-8) whatever the scores; the gradient is that of the probabilities, through the
        normalisation too.
    """
    projected = table @ weight.T + bias
    ids, weights = [], []
    for b in range(len(u)):
        cosine = projected @ u[b] / (projected.norm(dim=1) * u[b].norm())
        y = torch.softmax((cosine + noise[b]) / tau, dim=0)
        chosen = y.topk(k).indices
        w = (1 - y[chosen]).detach() + y[chosen]
        ids.append(chosen)
        weights.append(w / (w.sum() + 1e-8))
    return torch.stack(ids), torch.stack(weights)


def memory(table: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The weighted rows of all users, one user after another: [V, D_m], [B, K], [B, K] -> [B * K,
    D_m].
    """
    return torch.stack(
        [
            w * table[v]
            for user in zip(ids, weights, strict=True)
            for v, w in zip(*user, strict=True)
        ]
    )


def expert(
    x: Tensor, memory: Tensor, params: Mapping[str, Tensor], num_heads: int, head_dim: int
) -> Tensor:
    """Cross-attention from every position of every user to the whole batch's memory.

    Args:
        x: [B, L, D].
        memory: [R, D_m].
        params: ``query``, ``key``, ``value`` (to ``num_heads * head_dim``, head after head) and
            ``out`` (back to D), each with ``.weight`` and ``.bias``.
        num_heads: Heads.
        head_dim: Size of one.

    Returns:
        [B, L, D].
    """
    query = x @ params["query.weight"].T + params["query.bias"]
    key = memory @ params["key.weight"].T + params["key.bias"]
    value = memory @ params["value.weight"].T + params["value.bias"]
    heads = []
    for h in range(num_heads):
        block = slice(h * head_dim, (h + 1) * head_dim)
        attention = torch.softmax(
            query[..., block] @ key[:, block].T / math.sqrt(head_dim), dim=-1
        )  # [B, L, R]
        heads.append(attention @ value[:, block])
    return torch.cat(heads, dim=-1) @ params["out.weight"].T + params["out.bias"]


def gate(x: Tensor, weight: Tensor, bias: Tensor, times: int = 1) -> Tensor:
    """How much each expert counts: [B, L, D] -> [B, L, M]; the softmax is applied ``times``
    over.
    """
    pi = x @ weight.T + bias
    for _ in range(times):
        pi = torch.softmax(pi, dim=-1)
    return pi


def output(pi: Tensor, experts: Sequence[Tensor], consensus: Tensor | None, lam: float) -> Tensor:
    """The gated sum of the experts plus ``lam`` times the consensus expert: [B, L, M], M times [B,
    L, D] -> [B, L, D].
    """
    total = torch.zeros_like(experts[0])
    for m in range(len(experts)):
        total = total + pi[..., m, None] * experts[m]
    return total if consensus is None else total + lam * consensus


def consensus_memory(memories: Sequence[Tensor]) -> Tensor:
    """What the consensus expert attends to: the mean of its group's memories, [R, D_m]."""
    return torch.stack(list(memories)).mean(0)


def batch_mean_fisher(
    losses: Iterable[Tensor], parameters: Sequence[Mapping[str, Tensor]]
) -> list[dict[str, Tensor]]:
    """The mean over batches of the squared gradient of the batch's *mean* loss, for each expert's
    parameters.

    Args:
        losses: A scalar for each batch, in evaluation mode; at least one, and each depends on all
            parameters.
        parameters: An entry for each expert.

    Returns:
        An entry for each expert, with the parameters' names and shapes.
    """
    flat = [tensor for named in parameters for tensor in named.values()]
    # The losses may come from one graph, so it has to outlive the first of them.
    squares = [
        [g.square() for g in torch.autograd.grad(loss, flat, retain_graph=True)] for loss in losses
    ]
    means = iter([torch.stack(of_one).mean(0) for of_one in zip(*squares, strict=True)])
    return [{name: next(means) for name in named} for named in parameters]


def merge(
    thetas: Sequence[Mapping[str, Tensor]], fishers: Sequence[Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """The consensus expert's parameters: the experts' mean weighted by their Fisher, element by
    element.
    """
    merged = {}
    for name in thetas[0]:
        above, below = torch.zeros_like(thetas[0][name]), torch.zeros_like(thetas[0][name])
        for theta, fisher in zip(thetas, fishers, strict=True):
            above = above + fisher[name] * theta[name]
            below = below + fisher[name]
        merged[name] = above / (below + 1e-12)
    return merged


def bce(hidden: Tensor, positive_vectors: Tensor, negative_vectors: Tensor) -> Tensor:
    """SASRec's loss, one positive and one negative item a position: three times [N, D] -> scalar.

    The two terms of a position are added, not averaged; the mean is over the N real positions.
    """
    total = hidden.new_zeros(())
    for h, positive, negative in zip(hidden, positive_vectors, negative_vectors, strict=True):
        total = total - logsigmoid(h @ positive) - logsigmoid(-(h @ negative))
    return total / len(hidden)
