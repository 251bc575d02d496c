"""What the filter keeps and the router weighs, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch

from mltfr_dist.config import RunConfig
from mltfr_dist.data.batch import PADDING_IDX, lengths
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.tables.store import TokenTable
from mltfr_dist.training.inputs import Inputs, ranking_stream
from mltfr_dist.training.items import ItemMap

SAMPLE_USERS = 5
SHOWN_ITEMS = 5


@dataclass(frozen=True)
class TableView:
    """What one table contributes for one history."""

    table: str
    gate_weight: float
    tokens: list[tuple[str, float]]
    """Kept tokens with their weights, best first."""


def explain(
    model: Recommender, tables: Sequence[TokenTable], item_ids: torch.Tensor
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


def kept_token_texts(config: RunConfig, inputs: Inputs, model: Recommender) -> dict[str, str]:
    """TensorBoard texts: which tokens of which table the filter keeps for the first users of the validation split."""
    if model.mltfr is None:
        return {}
    device = next(model.parameters()).device
    one = Ranks(0, 1, device)
    items = ItemMap.load(config)
    texts = {}
    for batch in islice(ranking_stream(config, "valid", one), 1):
        item_ids = batch.item_ids[:SAMPLE_USERS].to(device)
        item_ids = item_ids[(item_ids != PADDING_IDX).any(1)]
        for user, views in enumerate(explain(model, inputs.tables, item_ids)):
            history = item_ids[user, : int(lengths(item_ids)[user])].tolist()
            lines = [
                "**Last items:** " + "; ".join(items.name(i) for i in history[-SHOWN_ITEMS:]),
                "",
            ]
            lines += ["| table | gate | kept tokens (weight) |", "|---|---|---|"]
            for view in views:
                tokens = ", ".join(
                    f"`{token.strip() or token!r}` {weight:.2f}" for token, weight in view.tokens
                )
                lines.append(
                    f"| {view.table} | {view.gate_weight:.2f} | {tokens.replace('|', '&#124;')} |"
                )
            texts[f"kept_tokens/user_{user}"] = "\n".join(lines)
    return texts
