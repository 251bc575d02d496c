"""What the geometry of token tables has to offer: how their rows spread, and what lies near what.

A model that reads a table without item text can gain from its content only where near rows mean
near things. So the cosine of a word's nearest neighbour is set beside that in a table of normal
rows of the same mean and covariance (tables/content.py), and the neighbourhoods of two tables are
compared: what two language models agree on is no accident of one.

Shapes: V rows, D columns, W words, K neighbours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mltfr_dist.errors import DataError
from mltfr_dist.tables.content import moments, with_content
from mltfr_dist.tables.row_file import BLOCK_ENTRIES
from mltfr_dist.tables.store import TokenTable

NEIGHBOURS = 10
SAMPLED_WORDS = 1_000
"""Words whose neighbourhoods are looked at, the same ones in every table."""

SHOWN_WORDS = 6
_WORD = re.compile(r" ([^\W\d_]{3,})")


@dataclass(frozen=True)
class Spread:
    """How a table's rows spread.

    Attributes:
        shares: [D], share of the variance along each principal axis, largest first.
        mean_cosine: of two different rows, as the model has them and as they are stored.
        nearest: [W], cosine of each sampled word with its nearest row.
        nearest_random: [W], the same in a table of normal rows of equal mean and covariance.
    """

    shares: Tensor
    mean_cosine: tuple[float, float]
    nearest: Tensor
    nearest_random: Tensor

    @property
    def dimensions(self) -> float:
        """Effective number of dimensions, 1 / sum of squared shares (participation ratio)."""
        return float(1 / self.shares.square().sum())


@dataclass(frozen=True)
class Overlap:
    """How far the neighbourhoods of two tables agree, among the words that both hold.

    Attributes:
        words: how many words both hold.
        share: mean share of a word's K nearest in one table that are among them in the other.
        by_chance: what unrelated tables would share: K / (words - 1).
    """

    words: int
    share: float
    by_chance: float


def words_of(table: TokenTable) -> dict[str, int]:
    """Whole words (letters only, lower case) and their rows; of several, the first."""
    words: dict[str, int] = {}
    for row, token in enumerate(table.vocabulary):
        match = _WORD.fullmatch(token)
        if match and match[1] == match[1].lower():
            words.setdefault(match[1], row)
    return words


def shared_words(tables: Sequence[TokenTable]) -> list[str]:
    """Words that all tables hold, sorted.

    Raises:
        DataError: fewer than twice as many as a neighbourhood.
    """
    held = [set(words_of(table)) for table in tables]
    words = sorted(set.intersection(*held))
    if len(words) < 2 * NEIGHBOURS:
        names = ", ".join(table.name for table in tables)
        raise DataError(
            f"{names}: {len(words)} whole words stand in all of them.",
            rule=f"Neighbourhoods are compared over at least {2 * NEIGHBOURS} words.",
            remedy="Name tables of one language, or one table alone.",
        )
    return words


def sampled(words: Sequence[str]) -> list[str]:
    """At most SAMPLED_WORDS of the words, evenly spaced."""
    indices = np.linspace(0, len(words) - 1, min(SAMPLED_WORDS, len(words))).astype(int)
    return [words[index] for index in indices]


def spread(table: TokenTable, words: Sequence[str]) -> Spread:
    """How the rows of ``table`` spread; nearest rows are looked up for ``words``."""
    lookup = words_of(table)
    indices = [lookup[word] for word in words]
    control = with_content(table, "random", seed=0)
    _, covariance = moments(table.rows.numpy())
    values = torch.from_numpy(np.linalg.eigvalsh(covariance)).flip(0).clamp(min=0)
    return Spread(
        shares=values / values.sum(),
        mean_cosine=(table.info.mean_cosine_before, table.info.mean_cosine_after),
        nearest=nearest(table.rows, indices, 1)[0][:, 0],
        nearest_random=nearest(control.rows, indices, 1)[0][:, 0],
    )


def nearest(rows: Tensor, indices: Sequence[int], k: int) -> tuple[Tensor, Tensor]:
    """Cosines and numbers [W, k] of the rows [V, D] nearest to those at ``indices`` [W], without
    themselves.

    In blocks of rows: memory is [W, block], not [W, V].
    """
    own = torch.tensor(indices)
    queries = F.normalize(rows[own], dim=1)  # [W, D]
    best = torch.full((len(indices), k), -torch.inf)
    numbers = torch.zeros((len(indices), k), dtype=torch.int64)
    size = max(k, BLOCK_ENTRIES // max(rows.shape[1], len(indices)))
    for start in range(0, len(rows), size):
        block = F.normalize(rows[start : start + size], dim=1)
        scores = queries @ block.T  # [W, block]
        inside = (own >= start) & (own < start + len(block))
        scores[inside.nonzero()[:, 0], own[inside] - start] = -torch.inf
        here = torch.arange(start, start + len(block)).expand(len(indices), -1)
        best, order = torch.cat([best, scores], 1).topk(k, dim=1)
        numbers = torch.cat([numbers, here], 1).gather(1, order)
    return best, numbers


def neighbour_words(
    table: TokenTable, words: Sequence[str], k: int
) -> list[list[tuple[str, float]]]:
    """The ``k`` tokens nearest to each word, with their cosines."""
    lookup = words_of(table)
    cosines, numbers = nearest(table.rows, [lookup[word] for word in words], k)
    return [
        [(table.vocabulary[row], cosine) for row, cosine in zip(of_word, values, strict=True)]
        for of_word, values in zip(numbers.tolist(), cosines.tolist(), strict=True)
    ]


def overlap(first: TokenTable, second: TokenTable) -> Overlap:
    """How far two tables agree on which words lie near to a word."""
    words = shared_words((first, second))
    chosen = [words.index(word) for word in sampled(words)]
    k, neighbours = min(NEIGHBOURS, len(words) - 1), []
    for table in (first, second):
        lookup = words_of(table)
        rows = table.rows[torch.tensor([lookup[word] for word in words])]
        neighbours.append(nearest(rows, chosen, k)[1])
    one, other = neighbours
    common = (one[:, :, None] == other[:, None, :]).any(2).float().mean()
    return Overlap(len(words), float(common), k / (len(words) - 1))


def overlaps(tables: Sequence[TokenTable]) -> dict[tuple[str, str], Overlap]:
    """Overlaps of all pairs of tables, by their names."""
    return {(a.name, b.name): overlap(a, b) for a, b in combinations(tables, 2)}
