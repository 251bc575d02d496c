"""Baselines in closed form: EASE, and matrix factorisation by alternating least squares.

Shapes: U users, I items, D factors, B users of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from scipy import linalg, sparse
from torch import Tensor

from mltfr_dist.data.batch import RankingBatch
from mltfr_dist.data.shards.packed import PackedSequences
from mltfr_dist.distributed.watchdog import heartbeat
from mltfr_dist.errors import ConfigError
from mltfr_dist.training.evaluating.rankers import Scorer

T = TypeVar("T")
Through = Callable[[Sequence[T]], Iterable[T]]
Matrix = NDArray[np.float64]

_SOLVED_AT_ONCE = 512
"""Systems of D equations that are held at a time: 17 MB at 64 factors."""


def interactions(train: PackedSequences, num_items: int) -> sparse.csr_matrix:
    """[U, I + 1] 1 where a user has an item; column = item id."""
    rows = np.repeat(np.arange(len(train)), train.lengths)
    shape = (len(train), num_items + 1)
    seen = sparse.csr_matrix((np.ones(len(rows)), (rows, train.items)), shape=shape)
    seen.data[:] = 1.0  # a user's repeats count once
    return seen


def histories(batch: RankingBatch, num_items: int) -> sparse.csr_matrix:
    """[B, I + 1] 1 where an item is in a user's full history."""
    indices = (batch.seen_rows.cpu().numpy(), batch.seen_items.cpu().numpy())
    shape = (len(batch.item_ids), num_items + 1)
    seen = sparse.csr_matrix((np.ones(len(indices[0])), indices), shape=shape)
    seen.data[:] = 1.0
    return seen


def as_scores(values: Matrix, batch: RankingBatch) -> Tensor:
    """[B, I + 1] with -inf for padding, where the batch is."""
    scores = torch.from_numpy(np.asarray(values, np.float32)).to(batch.item_ids.device)
    scores[:, 0] = -torch.inf
    return scores


def ease(
    train: PackedSequences, num_items: int, *, through: Through[int] = iter, ridge: float = 250.0
) -> Scorer:
    """EASE (Steck 2019, equation 8): each item by all others, by ridge regression in closed form.

    Args:
        train: All training sequences.
        num_items: I.
        through: What may end the work between its parts.
        ridge: The paper's lambda.

    Raises:
        ConfigError: Its dense matrices do not fit the free memory.
    """
    check_memory(num_items)
    seen = interactions(train, num_items)[:, 1:]
    gram = np.asarray((seen.T @ seen).todense())
    gram[np.diag_indices(num_items)] += ridge
    weights = gram
    for _ in through([0]):
        heartbeat()
        factor = linalg.cho_factor(gram, overwrite_a=True, check_finite=False)
        inverse = linalg.cho_solve(factor, np.eye(num_items), overwrite_b=True, check_finite=False)
        weights = inverse / -np.diag(inverse)
    weights[np.diag_indices(num_items)] = 0
    weights = np.pad(weights.astype(np.float32), ((1, 0), (1, 0)))

    def score(batch: RankingBatch) -> Tensor:
        return as_scores(histories(batch, num_items) @ weights, batch)

    return score


def check_memory(num_items: int) -> None:
    """Refuse EASE where its matrices do not fit.

    Raises:
        ConfigError: They do not.
    """
    needed, free = 3 * 8 * num_items**2, psutil.virtual_memory().available
    if needed > free:
        raise ConfigError(
            f"The baseline ease needs three dense matrices of {num_items:,} x {num_items:,} "
            f"numbers, {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free.",
            rule="EASE inverts a matrix of items by items in memory.",
            remedy="Leave ease out of `baselines`; item_knn and ials need no such matrix.",
        )


def ials(
    train: PackedSequences,
    num_items: int,
    *,
    through: Through[int] = iter,
    factors: int = 64,
    iterations: int = 15,
    alpha: float = 10.0,
    ridge: float = 1.0,
    seed: int = 0,
) -> Scorer:
    """Implicit matrix factorisation by alternating least squares (Hu, Koren and Volinsky 2008).

    A user's vector is solved for from the full history when it is scored, so that histories that
    have grown since training count as they are.

    Args:
        train: All training sequences.
        num_items: I.
        through: What may end the work between its iterations.
        factors: D.
        iterations: Of users, then items.
        alpha: Weight of what was seen is 1 + alpha.
        ridge: Squared norm's weight.
        seed: Of the first vectors.
    """
    seen = interactions(train, num_items)
    by_item = seen.T.tocsr()
    items = np.random.default_rng(seed).normal(0, 0.1, (num_items + 1, factors))
    items[0] = 0
    for _ in through(range(iterations)):
        users = solved(seen, items, alpha, ridge)
        items = solved(by_item, users, alpha, ridge)

    def score(batch: RankingBatch) -> Tensor:
        users = solved(histories(batch, num_items), items, alpha, ridge)
        return as_scores(users @ items.T, batch)

    return score


def solved(seen: sparse.csr_matrix, others: Matrix, alpha: float, ridge: float) -> Matrix:
    """The vectors [n, D] of rows that have seen ``others`` [m, D], equation 4 of the paper.

    Each minimises the weighted squared error to 1 of what it has seen and to 0 of the rest.
    """
    number, factors = seen.shape[0], others.shape[1]
    common = others.T @ others + ridge * np.eye(factors)
    solution = np.zeros((number, factors))
    for start in range(0, number, _SOLVED_AT_ONCE):
        heartbeat()
        end = min(number, start + _SOLVED_AT_ONCE)
        left, right = np.empty((end - start, factors, factors)), np.empty((end - start, factors))
        for row in range(start, end):
            own = others[seen.indices[seen.indptr[row] : seen.indptr[row + 1]]]
            left[row - start] = common + alpha * own.T @ own
            right[row - start] = (1 + alpha) * own.sum(0)
        solution[start:end] = np.linalg.solve(left, right[:, :, None])[:, :, 0]
    return solution
