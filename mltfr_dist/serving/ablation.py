"""What a model's answers owe to a table or to an item of the history: the model without it, and
gates by position.

Shapes: B histories, L positions, M tables, E gates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from mltfr_dist.models.experts import ExpertCore, ExpertRows, Output
from mltfr_dist.models.folded import shallow
from mltfr_dist.models.kernels import Blocks
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.ranking import Ranker
from mltfr_dist.serving.explaining import TableView
from mltfr_dist.serving.results import Recommendation

TOP = 10
Model = TypeVar("Model", bound=Ranker)


class Nothing(ExpertCore):
    """An expert that adds nothing."""

    def __init__(self) -> None:
        nn.Module.__init__(self)

    def output(self, x: Tensor, attended: list[ExpertRows], blocks: Blocks | None = None) -> Output:
        """Zeros, as ``x``."""
        return Output(torch.zeros_like(x), None)

    def reads_in_place(self, x: Tensor, attended: list[ExpertRows], num_blocks: int) -> bool:
        """Nothing is read."""
        return True


def without_table(model: Recommender, m: int) -> Recommender:
    """The model whose experts of table ``m`` add nothing, and whose consensus expert does not read
    it.

    Gates stay as they were: what the table had is lost, not given to the others.
    """
    assert model.mltfr is not None
    lean, mltfr = shallow(model), shallow(model.mltfr)
    silent = set(mltfr.experts_of([m]))
    mltfr.cores = nn.ModuleList(
        Nothing() if e in silent else core for e, core in enumerate(mltfr.cores)
    )
    mltfr.consensus_members = [e for e in mltfr.consensus_members if e not in silent]
    if not mltfr.consensus_members:
        mltfr.consensus = None
    lean.mltfr = mltfr
    return lean


@dataclass(frozen=True)
class Effect:
    """What changes among the top ten where something is left out."""

    what: str
    stay: int
    """Of the top ten, those that are still there."""
    entered: list[str]
    """Names of the items that take the others' places, best first."""
    shift: float
    """Mean absolute change of the scores of the items that were the top ten."""


@dataclass(frozen=True)
class Answer:
    """One history, what is recommended after it, and why."""

    user: str
    history: list[str]
    """Names of the items that the model reads."""
    best: list[Recommendation]
    views: list[TableView]
    gates: list[list[float]]
    """[L][M] gate weight of each table at each position."""
    tables: list[Effect]
    items: list[Effect]


def answer(model: Ranker, user: str, history: list[str], num_items: int) -> Answer:
    """Explain one history.

    Args:
        model: A run or an export.
        user: What to call it.
        history: Raw ids, oldest first. Where it is longer than what the model reads, an item that
            is left out lets an older one in, and so no position moves.
        num_items: Items of the history, the latest, that are left out in turn.
    """
    names = [model.items.name(number) for number in model.items.encode(history)]
    best = model.recommend(history, k=min(TOP, _candidates(model, history)))
    tables, views = [], model.explain(history)
    for m, view in enumerate(views):
        other = replace(model, model=without_table(model.serving, m))
        tables.append(_effect(view.table, model, history, best, other, history))
    items = []
    if len(history) > 1:
        for index in range(max(0, len(history) - num_items), len(history)):
            rest = history[:index] + history[index + 1 :]
            items.append(_effect(names[index], model, history, best, model, rest))
    read = slice(-model.max_len, None)
    return Answer(user, names[read], best, views, gates(model, history[read]), tables, items)


def _candidates(model: Ranker, history: list[str]) -> int:
    return max(1, model.items.num_items - len(set(history)))


def _effect(
    what: str,
    model: Ranker,
    history: list[str],
    best: list[Recommendation],
    other: Ranker,
    rest: list[str],
) -> Effect:
    ids = [item.item_id for item in best]
    others = other.recommend(rest, k=len(best), exclude=history)
    entered = [r.title or r.item_id for r in others if r.item_id not in ids]
    change = other.score([rest], ids) - model.score([history], ids)
    return Effect(what, len(best) - len(entered), entered, float(abs(change).mean()))


@torch.no_grad()
def gates(model: Ranker, history: list[str]) -> list[list[float]]:
    """[L][M] gate weights of the tables' experts at each position; empty for a bare backbone."""
    whole = model.serving
    mltfr = whole.mltfr
    if mltfr is None:
        return []
    device = next(whole.parameters()).device
    item_ids = torch.tensor([model.items.encode(history)], device=device)
    blocks = mltfr.blocks(*whole.backbone.inputs(item_ids))
    gate = blocks.at_real(mltfr.router(blocks.positions))[:, : mltfr.num_experts]  # [L, E]
    weights: list[list[float]] = gate.view(len(gate), mltfr.num_tables, -1).sum(2).tolist()
    return weights
