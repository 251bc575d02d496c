"""Seed words: a table cut down to the rows of given words and those nearest to them.

Shapes: V rows, D columns, W rows of seed words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.nn import functional as F

from mltfr_dist.config import FilterConfig
from mltfr_dist.errors import ConfigError
from mltfr_dist.tables.store import TokenTable


def seed_tables(tables: Sequence[TokenTable], config: FilterConfig) -> tuple[TokenTable, ...]:
    """Each table's rows of the seed words and of their neighbours, in row order.

    Raises:
        ConfigError: A word that no vocabulary holds, or a vocabulary that holds none of the words.
    """
    words = [word.strip().lower() for word in config.seed_words]
    rows_by_word = [rows_of(table, words) for table in tables]
    unknown = [word for word in words if not any(word in rows for rows in rows_by_word)]
    if unknown:
        raise ConfigError(
            f"No vocabulary holds the seed word{'s' if len(unknown) > 1 else ''} "
            f"{', '.join(map(repr, unknown))}.",
            rule="A seed word is a whole token of at least one table (case does not count).",
            remedy="Correct mltfr.filter.seed_words, or leave it out.",
        )
    for table, rows in zip(tables, rows_by_word, strict=True):
        if not rows:
            raise ConfigError(
                f"The vocabulary of table `{table.name}` holds none of the seed words.",
                rule="An expert needs something to read.",
                remedy="Leave the table out of mltfr.tables, or add a word to "
                "mltfr.filter.seed_words that it holds.",
            )
    return tuple(
        cut(table, [i for ids in rows.values() for i in ids], config.seed_neighbours)
        for table, rows in zip(tables, rows_by_word)
    )


def rows_of(table: TokenTable, words: Sequence[str]) -> dict[str, list[int]]:
    """Word to the rows whose token it is, with any case and with or without a leading space; words
    without a row are left out.
    """
    rows_by_word: dict[str, list[int]] = {}
    wanted = set(words)
    for row, token in enumerate(table.vocabulary):
        word = token.strip().lower()
        if word in wanted:
            rows_by_word.setdefault(word, []).append(row)
    return rows_by_word


def cut(table: TokenTable, seeds: Sequence[int], num_neighbours: int) -> TokenTable:
    """``table`` with the rows ``seeds`` and, of each, the ``num_neighbours`` others of highest
    cosine.
    """
    unit = F.normalize(table.rows, dim=1)  # [V, D]
    order = (
        (unit[list(seeds)] @ unit.T).topk(min(num_neighbours + 1, len(unit)), dim=1).indices
    )  # [W, n + 1], itself first
    ids = torch.tensor(sorted({*order.flatten().tolist(), *seeds}))
    return replace(table, rows=table.rows[ids], row_ids=tuple(ids.tolist()))
