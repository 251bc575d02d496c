"""Why one position of one user looks as it does.

Shapes: B users, L positions, D hidden size, M tables, K kept rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mltfr_dist.data.batch import lengths
from mltfr_dist.models.mltfr import MLTFR
from mltfr_dist.models.packing import Packing

EXPLAINED = 16
"""Tokens that an explanation lists at most, where all of a table's rows are attended to."""


class Explanation(NamedTuple):
    """What one position reads."""

    kept_ids: list[Tensor]
    """Per table: [K] row numbers of the kept tokens, best first."""
    kept_weights: list[Tensor]
    """Per table: [K] their weights, summing to 1."""
    gate_weights: Tensor
    """[M], of each table's experts together; they sum to 1 unless there is a null expert, which has
    the rest.
    """


@torch.no_grad()
def explain(mltfr: MLTFR, x: Tensor, packing: Packing) -> list[Explanation]:
    """Kept tokens and gate weights at the last real position of each user.

    Args:
        mltfr: The model.
        x: [N, D] input embeddings of the real positions.
        packing: Where they stand.
    """
    blocks = mltfr.blocks(x, packing)
    selections = mltfr.selections(mltfr.queries(blocks))
    gate_weights = mltfr.router(blocks.positions)
    explanations = []
    for user, length in enumerate(lengths(packing.item_ids).tolist()):
        g, at = blocks.index(user, length - 1)
        ids, weights = [], []
        for selection in selections:
            every = selection.kept is None
            ids.append(
                selection.row_ids[:EXPLAINED]
                if selection.kept is None
                else selection.row_ids[selection.kept[g]]
            )
            weights.append(selection.weights()[0 if every else g, : len(ids[-1])].float())
        of_experts = gate_weights[g, at, : mltfr.num_experts].float()
        of_tables = of_experts.view(mltfr.num_tables, -1).sum(1)
        explanations.append(Explanation(ids, weights, of_tables))
    return explanations
