"""Control tables: what a stored table is replaced by to ask whether its content matters. Made at
load, never stored.

``random``: rows drawn from the normal distribution with the mean and the *full covariance* of the
real rows. Spectrum, anisotropy and scale are the language model's; which token lies where, and
anything beyond second moments, is noise.

``shuffled``: each column permuted over the rows by itself. Every marginal distribution stays
exactly (heavy tails too); correlations between columns, and so the geometry, are gone. Permuting
whole rows would change nothing at all: without a link between items and tokens, a table is a set of
rows.

The two controls keep different halves of the table's statistics, so that neither's shape explains a
difference alone.

Shapes: V rows, D columns.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import torch

from mltfr_dist.config import TableContent
from mltfr_dist.tables.store import TokenTable


def with_content(table: TokenTable, content: TableContent, seed: int) -> TokenTable:
    """``table`` with its rows replaced as ``content`` says; a function of the real rows, the
    table's name and ``seed``.

    The sha256 is that of the recipe (content, seed, name, hash of the real file) and not of the
    made rows: these may differ in the last bit between numerical libraries, and a run must still be
    able to go on.
    """
    if content == "real":
        return table
    recipe = hashlib.sha256(f"{content}/{seed}/{table.name}/{table.sha256}".encode())
    rng = np.random.Generator(np.random.Philox(int.from_bytes(recipe.digest()[:16])))
    rows = table.rows.numpy()
    made = gaussian_like(rows, rng) if content == "random" else shuffled_columns(rows, rng)
    return replace(table, rows=torch.from_numpy(made), content=content, sha256=recipe.hexdigest())


def gaussian_like(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[V, D] normal rows with the mean and covariance of ``rows`` [V, D]."""
    mean, covariance = moments(rows)
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(np.clip(values, 0, None))).T.astype(np.float32)  # [D, D]
    made: np.ndarray = rng.standard_normal(rows.shape, dtype=np.float32) @ root + mean.astype(
        np.float32
    )
    return made


def moments(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and covariance [D, D] of ``rows`` [V, D] in float64, never the whole table in it."""
    mean = rows.mean(axis=0, dtype=np.float64)
    covariance = np.zeros((rows.shape[1], rows.shape[1]))
    for block in np.array_split(rows, max(1, len(rows) // 8192)):
        centred = block - mean
        covariance += centred.T @ centred
    return mean, covariance / len(rows)


def shuffled_columns(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[V, D] with each column of ``rows`` in an order of its own."""
    made = np.empty_like(rows)
    for column in range(rows.shape[1]):
        made[:, column] = rows[rng.permutation(len(rows)), column]
    return made
