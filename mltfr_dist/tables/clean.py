"""Normalisation of token tables on disk, in blocks of rows: memory does not grow with the table.

Language models' embeddings are anisotropic: their rows share a large common direction. Centring
removes it. Shapes: V rows, D columns; sums and statistics are float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from scipy.linalg import blas

from mltfr_dist.progress import follow, say
from mltfr_dist.tables.row_file import BLOCK_ENTRIES, RowFile

EIGENVALUE_FLOOR = 1e-6
"""Whitening: eigenvalues below this share of the largest count as this share, so that noise is not
blown up.
"""

PRODUCT_ENTRIES = 1 << 21
"""Numbers in a block of a matrix product: large, for each block passes over a [D, D] sum."""

_LONG_EIGENVECTORS = 2048

Log = Callable[[str], None]


class MeanCosine:
    """Mean cosine over all pairs of different rows, exactly, without forming the pairs.

    The squared norm of the sum of the N unit rows is N + the sum over ordered pairs. Zero rows have
    no direction and are left out.
    """

    def __init__(self, dim: int) -> None:
        self._total = torch.zeros(dim, dtype=torch.float64)
        self._count = 0

    def add(self, rows: torch.Tensor) -> None:
        """Take ``rows`` [n, D] in."""
        for block in torch.split(rows, max(1, BLOCK_ENTRIES // rows.shape[1])):
            exact = block.double()
            norms = exact.norm(dim=1, keepdim=True)  # [n, 1]
            self._total += (exact / norms.where(norms > 0, 1.0)).sum(0)
            self._count += int((norms > 0).sum())

    @property
    def value(self) -> float:
        """Of the rows so far; 0 for fewer than two directions."""
        n = self._count
        return float((self._total.square().sum() - n) / (n * (n - 1))) if n > 1 else 0.0


def normalise_rows(
    rows: RowFile, how: Literal["scale", "whiten", "none"], log: Log = say
) -> tuple[float, float]:
    """Normalise ``rows`` [V, D], not all equal, in place; their mean cosine before and after.

    scale: subtract the mean row, then divide every entry by the root mean square of all entries:
    entries have unit variance over the table and directions keep their proportions. whiten:
    subtract the mean row, then ZCA: covariance is the identity (but for floored directions), axes
    turned as little as possible. none: unchanged.
    """
    mean, before = torch.zeros(rows.dim, dtype=torch.float64), MeanCosine(rows.dim)
    for _, block in follow(rows.blocks(), "measuring", rows.num_rows, log):
        mean += block.double().sum(0)
        before.add(block)
    if how == "none":
        return before.value, before.value
    mean /= rows.num_rows
    return before.value, _scale(rows, mean, log) if how == "scale" else _whiten(rows, mean, log)


def _scale(rows: RowFile, mean: torch.Tensor, log: Log) -> float:
    mean_square = 0.0
    for start, block in follow(rows.blocks(), "centring", rows.num_rows, log):
        block.copy_(block.double() - mean)
        rows.write(start, block)
        mean_square += float(block.double().square().sum()) / (rows.num_rows * rows.dim)
    after = MeanCosine(rows.dim)
    for start, block in follow(rows.blocks(), "scaling", rows.num_rows, log):
        block.div_(mean_square**0.5)
        rows.write(start, block)
        after.add(block)
    return after.value


def _whiten(rows: RowFile, mean: torch.Tensor, log: Log) -> float:
    # One triangle of the symmetric sum is half the work: float64 costs what float32 would.
    covariance = np.zeros((rows.dim, rows.dim), order="F")  # [D, D]
    for start, block in follow(rows.blocks(PRODUCT_ENTRIES), "covariance", rows.num_rows, log):
        exact = block.double().sub_(mean)
        rows.write(start, block.copy_(exact))
        exact.copy_(block)  # as it is stored
        covariance = blas.dsyrk(1.0, exact.numpy().T, beta=1.0, c=covariance, overwrite_c=1)
    if rows.dim >= _LONG_EIGENVECTORS:
        log(f"  eigenvectors of the {rows.dim:,} x {rows.dim:,} covariance ...")
    # dsyrk fills the upper triangle in Fortran's order, the lower one in torch's.
    symmetric = torch.from_numpy(covariance.T).div_(rows.num_rows)
    eigenvalues, axes = torch.linalg.eigh(symmetric, UPLO="L")
    eigenvalues = eigenvalues.clamp(min=EIGENVALUE_FLOOR * float(eigenvalues[-1]))
    transform = ((axes * eigenvalues.rsqrt()) @ axes.T).float()  # [D, D], symmetric
    after = MeanCosine(rows.dim)
    for start, block in follow(rows.blocks(PRODUCT_ENTRIES), "whitening", rows.num_rows, log):
        whitened = block @ transform
        rows.write(start, whitened)
        after.add(whitened)
    return after.value
