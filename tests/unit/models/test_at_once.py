"""All tables in one pass, as on a GPU, give what tables one by one give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import new_model
from torch import Tensor

from mltfr_dist.config import (
    BackboneConfig,
    ExpertConfig,
    FilterConfig,
    LossConfig,
    MLTFRConfig,
    RouterConfig,
)
from mltfr_dist.data.batch import SequenceBatch
from mltfr_dist.models import at_once, mltfr
from mltfr_dist.models.folded import folded
from mltfr_dist.models.kernels import build
from mltfr_dist.models.output import TrainingOutput
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.numerics import in_order
from mltfr_dist.serving.ablation import without_table

WIDTHS = (12, 5, 20)
EXPERT = ExpertConfig(num_heads=2, head_dim=4, dropout=0.0)
BACKBONE = BackboneConfig(hidden_dim=16, num_layers=2, num_heads=2, dropout=0.0)
ITEM_IDS = torch.tensor([[1, 2, 0, 0, 0, 0], [3, 4, 5, 0, 0, 0], [6, 7, 8, 9, 10, 11]])
BATCH = SequenceBatch(ITEM_IDS, (ITEM_IDS + 1) * (ITEM_IDS > 0), torch.arange(3)).counted()


WHOLE = FilterConfig(top_k=3, shortlist_size=None, query_every=2)


def made(
    *, consensus: bool = False, rows: tuple[int, ...] = (60, 60, 60), **changes: Any
) -> Recommender:
    """A model of three tables of different widths in training."""
    torch.manual_seed(0)
    fields = {
        "tables": tuple(f"tables/{m}" for m in range(len(WIDTHS))),
        "filter": FilterConfig(top_k=3, shortlist_size=40, query_every=2),
        "expert": EXPERT,
    }
    model = new_model(
        BACKBONE,
        MLTFRConfig(**(fields | changes)),
        LossConfig(),
        num_items=20,
        max_len=6,
        table_rows=[torch.randn(*shape) for shape in zip(rows, WIDTHS, strict=True)],
    )
    assert model.mltfr is not None
    with torch.no_grad():  # experts start equal, which would hide that two are exchanged
        for parameter in model.mltfr.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    if consensus:
        model.mltfr.add_consensus(tables=[0, 2])
    return model.train()


def parts_of(model: Recommender) -> at_once.Parts:
    assert model.mltfr is not None
    assert model.mltfr._parts is not None
    return model.mltfr._parts


def step(model: Recommender, batch: SequenceBatch = BATCH) -> dict[str, Tensor]:
    """All numbers of one forward and backward pass."""
    model.zero_grad()
    output = model(batch)
    assert isinstance(output, TrainingOutput)
    terms = {name: term.sum for name, term in output.terms.items()}
    torch.stack([term.sum() for term in terms.values()]).sum().backward()
    assert output.routing is not None
    result = {name: t.detach() for name, t in terms.items()} | output.routing._asdict()
    return result | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("scores", [1, 300, at_once.SCORES])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"consensus": True},
        {"consensus": True, "expert": EXPERT.model_copy(update={"per_table": 2})},
        {"router": RouterConfig(top_k=2, null_expert=True)},
        {"filter": FilterConfig(top_k=3, shortlist_size=40, learn_temperature=True)},
        {"rows": (60, 70, 300)},
        {"filter": WHOLE, "consensus": True, "rows": (60, 7, 300)},
    ],
    ids=[
        "usual",
        "consensus",
        "two experts a table",
        "null expert",
        "learned temperature",
        "other sizes",
        "every token",
    ],
)
def test_one_pass_gives_what_tables_one_by_one_give(
    changes: dict[str, Any], scores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many queries are scored at a time."""
    monkeypatch.setattr(at_once, "SCORES", scores)
    monkeypatch.setattr(build, "library", lambda: None)  # kernels are for the CPU alone
    model = made(**changes)
    one_by_one = step(model)
    passes: list[bool] = []

    def alike(parts: at_once.Parts, _: torch.device) -> bool:
        passes.append(at_once.may_be_one(parts))
        return passes[-1]

    monkeypatch.setattr(mltfr, "all_alike", alike)
    together = step(model)
    assert passes == [True]
    assert together.keys() == one_by_one.keys()
    for name, value in one_by_one.items():
        torch.testing.assert_close(together[name], value, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("changes", [{}, {"filter": WHOLE}], ids=["shortlists", "every token"])
def test_a_batch_of_nobody_is_read_too(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank may have none; its gradients are zero, and of every parameter that others have."""
    monkeypatch.setattr(build, "library", lambda: None)
    monkeypatch.setattr(mltfr, "all_alike", lambda parts, _: at_once.may_be_one(parts))
    model = made(consensus=True, **changes)
    everyone = step(model)
    empty = torch.zeros(2, 6, dtype=torch.int64)
    nobody = step(model, SequenceBatch(empty, empty, torch.arange(2)).counted())
    assert nobody.keys() == everyone.keys()
    assert all(not nobody[name].any() for name, _ in model.named_parameters() if name in nobody)


@pytest.mark.parametrize("changes", [{}, {"filter": WHOLE}], ids=["shortlists", "every token"])
def test_gradients_come_in_one_order_whatever_the_batch(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes add them up in buckets, by the order in which they come."""
    monkeypatch.setattr(build, "library", lambda: None)
    monkeypatch.setattr(mltfr, "all_alike", lambda parts, _: at_once.may_be_one(parts))
    model, come = made(consensus=True, **changes), list[str]()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda _, name=name: come.append(name))
    orders = set()
    shorter = torch.tensor([[1, 0, 0, 0, 0, 0]])
    for item_ids in (ITEM_IDS, shorter, torch.zeros_like(shorter)):
        for scores in (1, 300, 1 << 26):
            monkeypatch.setattr(at_once, "SCORES", scores)
            come.clear()
            step(model, SequenceBatch(item_ids, item_ids, torch.arange(len(item_ids))).counted())
            orders.add(tuple(come))
    assert len(orders) == 1
    assert len(come) > 30


@pytest.mark.parametrize(
    "changes",
    [
        {"filter": FilterConfig(top_k=3, shortlist_size=40, noise=0.5)},
        {"filter": WHOLE.model_copy(update={"noise": 0.5})},
        {"filter": FilterConfig(strategy="learned_prototypes")},
        {"filter": FilterConfig(top_k=3, shortlist_size=40), "rows": (60, 40, 60)},
        {
            "filter": FilterConfig(top_k=None, filter_ratio=0.1, shortlist_size=40),
            "rows": (60, 60, 80),
        },
    ],
    ids=[
        "noise",
        "every token and noise",
        "prototypes",
        "one without a list",
        "other numbers kept",
    ],
)
def test_tables_that_are_read_otherwise_stay_one_by_one(changes: dict[str, Any]) -> None:
    assert not at_once.may_be_one(parts_of(made(**changes)))


def test_a_tapped_expert_is_read_by_itself() -> None:
    model = made()
    assert model.mltfr is not None
    assert at_once.may_be_one(parts_of(model))
    with model.mltfr.core(1).tapped():
        assert not at_once.may_be_one(parts_of(model))


def test_a_folded_model_and_one_without_an_expert_are_read_by_their_own_parts() -> None:
    """On a GPU, too: a model that recommends is folded."""
    model = made(consensus=True).eval()
    for lean in (folded(model), without_table(model, 1)):
        assert not at_once.may_be_one(parts_of(lean))


def test_evaluation_reads_tables_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what is computed once for an export is equal to the bit, on a GPU too."""
    passes: list[bool] = []
    monkeypatch.setattr(mltfr, "all_alike", lambda *_: passes.append(True))
    model = made().eval()
    model.last_hidden(ITEM_IDS)
    assert not passes
    step(model.train())
    assert passes


def test_a_cpu_reads_tables_one_by_one() -> None:
    assert not at_once.all_alike(parts_of(made()), torch.device("cpu"))


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 300),
    count=st.integers(1, 20),
    kinds=st.sampled_from([2, 30, 1 << 20]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_numbers_are_ordered_by_value_and_then_by_index(
    width: int, count: int, kinds: int, dtype: torch.dtype, seed: int
) -> None:
    """Of either sign, with zeros of both, and where many are equal."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(-kinds, kinds + 1, (2, 3, width), generator=generator) / kinds
    scores = torch.where(scores == 0, torch.tensor([0.0, -0.0]).repeat(width)[:width], scores)
    scores, count = scores.to(dtype), min(count, width)
    expected = scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    assert torch.equal(in_order(scores, count)[1], expected)
