"""Normalisation of token tables, in place and in blocks of rows, so that a table is held in memory once.

Language models' embeddings are anisotropic: their rows share a large common direction. Centring removes it.
Shapes: V rows, D columns; sums and statistics are float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch

from mltfr_dist.errors import DataError

EIGENVALUE_FLOOR = 1e-6
"""Whitening: eigenvalues below this share of the largest count as this share, so that noise is not blown up."""

_BLOCK_ENTRIES = 1 << 18  # 2 MiB in float64; a few such copies live at a time


def normalise_rows(rows: torch.Tensor, how: Literal["scale", "whiten", "none"]) -> None:
    """Normalise ``rows`` [V, D] float32 in place.

    scale: subtract the mean row, then divide every entry by the root mean square of all entries: entries have unit
    variance over the table and directions keep their proportions. whiten: subtract the mean row, then ZCA:
    covariance is the identity (but for floored directions), axes turned as little as possible. none: unchanged.

    Raises:
        DataError: all rows are equal, so that there is nothing to scale.
    """
    if how == "none":
        return
    mean = sum(
        (block.double().sum(0) for block in _blocks(rows)),
        torch.zeros(rows.shape[1], dtype=torch.float64),
    ) / len(rows)
    for block in _blocks(rows):
        block.copy_(block.double() - mean)
    covariance = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)  # [D, D]
    mean_square = 0.0
    for block in _blocks(rows):
        exact = block.double()
        if how == "whiten":
            covariance += exact.T @ exact
        mean_square += float(exact.square().sum()) / rows.numel()
    if mean_square == 0:
        raise DataError(
            "All rows of the token table are equal.",
            remedy="Check that `tensor` names the embedding.",
        )
    if how == "scale":
        rows.div_(mean_square**0.5)
        return
    eigenvalues, axes = torch.linalg.eigh(covariance / len(rows))
    eigenvalues = eigenvalues.clamp(min=EIGENVALUE_FLOOR * float(eigenvalues[-1]))
    transform = (axes * eigenvalues.rsqrt()) @ axes.T  # [D, D], symmetric
    for block in _blocks(rows):
        block.copy_(block.double() @ transform)


def mean_cosine(rows: torch.Tensor) -> float:
    """Mean cosine over all pairs of different rows of ``rows`` [V, D], exactly, without forming the pairs.

    The squared norm of the sum of the N unit rows is N + the sum over ordered pairs. Zero rows have no direction
    and are left out. Returns 0 for fewer than two directions.
    """
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    count = 0
    for block in _blocks(rows):
        exact = block.double()
        norms = exact.norm(dim=1, keepdim=True)  # [n, 1]
        total += (exact / norms.where(norms > 0, 1.0)).sum(0)
        count += int((norms > 0).sum())
    return float((total.square().sum() - count) / (count * (count - 1))) if count > 1 else 0.0


def _blocks(rows: torch.Tensor) -> Iterator[torch.Tensor]:
    yield from torch.split(rows, max(1, _BLOCK_ENTRIES // rows.shape[1]))
