"""What the token filter keeps for a history, and what the router weighs, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from mltfr_dist.models.recommender import Recommender


class Tokens(Protocol):
    """The names of a token table's rows."""

    @property
    def name(self) -> str:
        """Of the table."""

    def token(self, row: int) -> str:
        """Of a row."""


@dataclass(frozen=True)
class NamedRows:
    """Names of those rows of a table that an export may show."""

    name: str
    tokens: dict[int, str]

    def token(self, row: int) -> str:
        """Of a row."""
        return self.tokens[row]


@dataclass(frozen=True)
class TableView:
    """What one table contributes for one history."""

    table: str
    gate_weight: float
    tokens: list[tuple[str, float]]
    """Kept tokens with their weights, best first."""


def explain(
    model: Recommender, tables: Sequence[Tokens], item_ids: torch.Tensor
) -> list[list[TableView]]:
    """Per history [B, L], per table: gate weight and kept tokens at the last position."""
    assert model.mltfr is not None
    made = model.mltfr.config.filter.strategy == "learned_prototypes"
    views = []
    for explanation in model.explain(item_ids):
        views.append(
            [
                TableView(
                    table.name,
                    float(explanation.gate_weights[m]),
                    [
                        (f"prototype {int(row)}" if made else table.token(int(row)), float(weight))
                        for row, weight in zip(
                            explanation.kept_ids[m], explanation.kept_weights[m], strict=True
                        )
                    ],
                )
                for m, table in enumerate(tables)
            ]
        )
    return views
