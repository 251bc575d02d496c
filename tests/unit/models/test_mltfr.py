"""MLTFR in repaired form: properties of the method, and a restatement of its formulas, loop by
loop.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import new_model, with_loss
from torch import Tensor, nn
from torch.nn import functional as F

from mltfr_dist.config import (
    BackboneConfig,
    ConsensusConfig,
    ExpertConfig,
    FilterConfig,
    LossConfig,
    MLTFRConfig,
    RouterConfig,
)
from mltfr_dist.data.batch import RankingBatch, SequenceBatch
from mltfr_dist.distributed.ranks import ALONE
from mltfr_dist.models import search as searching
from mltfr_dist.models.cross_entropy import full_cross_entropy
from mltfr_dist.models.experts import ExpertCore, ExpertRows
from mltfr_dist.models.mltfr import MLTFR
from mltfr_dist.models.output import TrainingOutput
from mltfr_dist.models.packing import Packing
from mltfr_dist.models.placed_table import ReplicatedTable
from mltfr_dist.models.query_blocks import prefix_mean
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.models.relevance import row_relevance
from mltfr_dist.models.router import Router
from mltfr_dist.models.routing import routing_sums
from mltfr_dist.models.search import best, largest, search, search_rows
from mltfr_dist.models.selectors import Queries, Selection
from mltfr_dist.models.selectors.user_guided import UserGuided
from mltfr_dist.numerics import top_of
from mltfr_dist.tables.store import table_hash

NUM_ITEMS, MAX_LEN, DIM, TOP_K = 30, 10, 16, 4
SHAPES = ((60, 24), (90, 32), (50, 8))
EVERY = [1, 3, 4]
HISTORY = st.lists(st.integers(1, NUM_ITEMS), min_size=1, max_size=MAX_LEN)
few = settings(max_examples=15, deadline=None, derandomize=True)


def make(
    query_every: int = 4,
    *,
    consensus: bool = False,
    shortlist: int | None = None,
    spread: float = 0.3,
    **fields: object,
) -> Recommender:
    """A model whose parameters are moved far from their start, so that nothing is near zero by
    accident.
    """
    torch.manual_seed(0)
    fields = {"top_k": TOP_K, "temperature": 0.1} | fields
    config = MLTFRConfig(
        tables=tuple(f"table{m}" for m in range(len(SHAPES))),
        filter=FilterConfig(query_every=query_every, shortlist_size=shortlist, **fields),
        expert=ExpertConfig(num_heads=2, head_dim=4, dropout=0.1),
        consensus=ConsensusConfig(weight=0.7),
    )
    backbone = BackboneConfig(hidden_dim=DIM, num_layers=2, num_heads=2, dropout=0.2)
    tables = [torch.randn(*shape) for shape in SHAPES]
    made = new_model(
        backbone, config, LossConfig(), num_items=NUM_ITEMS, max_len=MAX_LEN, table_rows=tables
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "log_temperature" not in name:
                parameter.add_(spread * torch.randn_like(parameter))
        made.backbone.item_embedding.weight[0] = 0
    if consensus:
        mltfr_of(made).add_consensus(
            {
                name: 0.4 * torch.randn_like(p)
                for name, p in mltfr_of(made).cores[0].named_parameters()
            }
        )
    return made.eval()


shared = cache(make)


@cache
def exact(query_every: int) -> Recommender:
    """In float64: a leak shows far below the rounding of fp32."""
    return make(query_every, consensus=True).double()


def mltfr_of(model: Recommender) -> MLTFR:
    assert model.mltfr is not None
    return model.mltfr


def padded(histories: list[list[int]], width: int = 0) -> Tensor:
    width = max(width, 1, *(len(h) for h in histories))
    return torch.tensor([h + [0] * (width - len(h)) for h in histories])


def inputs(histories: list[list[int]], model: Recommender) -> tuple[Tensor, Packing]:
    """What MLTFR is given: input embeddings of the real positions, and where they stand."""
    with torch.no_grad():
        return model.backbone.inputs(padded(histories))


def kept_tokens(mltfr: MLTFR, queries: Tensor) -> list[Selection]:
    """What each table's user-guided filter keeps for queries [G, D]; kept are row numbers."""
    return [replace(s, kept=s.row_ids[s.kept]) for s in mltfr.selections(Queries(queries))]


def queries_of(mltfr: MLTFR, x: Tensor, packing: Packing) -> Tensor:
    return mltfr.blocks(x, packing).queries


def relevance_of(mltfr: MLTFR, x: Tensor, packing: Packing) -> list[Tensor]:
    """Per table, [V_m] largest cosine of each row with any query."""
    with torch.no_grad():
        return [
            mltfr.table(m).relevance(queries_of(mltfr, x, packing), mltfr.selectors[m].project)
            for m in range(len(SHAPES))
        ]


def set_shortlists(mltfr: MLTFR, relevance: list[Tensor]) -> None:
    for selector, values in zip(mltfr.selectors, relevance, strict=True):
        selector.shortlist.choose(values)


def recall_of(mltfr: MLTFR, queries: Tensor) -> list[float]:
    return [
        s.shortlist.recall(queries, mltfr.table(m), s.project, s.num_kept, ALONE).item()
        for m, s in enumerate(mltfr.selectors)
    ]


def padded_hidden(model: Recommender, item_ids: Tensor) -> Tensor:
    """Hidden states [B, L, D], zero at padding."""
    hidden, packing, _ = model.hidden(item_ids)
    return packing.unpack(hidden)


def training_batch(histories: list[list[int]]) -> SequenceBatch:
    return SequenceBatch(
        padded([h[:-1] for h in histories]),
        padded([h[1:] for h in histories]),
        torch.arange(len(histories)),
    )


def some_histories(count: int = 6, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(2, MAX_LEN + 1, (count,), generator=generator).tolist()
    return [
        torch.randint(1, NUM_ITEMS + 1, (size,), generator=generator).tolist() for size in sizes
    ]


# --- properties of the repaired method
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("query_every", EVERY)
@few
@given(histories=st.lists(HISTORY, min_size=1, max_size=5), width=st.integers(0, MAX_LEN))
def test_a_user_is_the_same_alone_and_in_any_batch_of_any_width(
    query_every: int, histories: list[list[int]], width: int
) -> None:
    model = shared(query_every, consensus=True)
    together = padded_hidden(model, padded([*histories, []], width))
    for row, history in zip(together, histories):
        alone = padded_hidden(model, padded([history]))
        torch.testing.assert_close(row[: len(history)], alone[0], rtol=0, atol=2e-6)
        assert row[len(history) :].abs().sum() == 0
    assert together[-1].abs().sum() == 0


@pytest.mark.parametrize("query_every", EVERY)
@few
@given(histories=st.lists(HISTORY, min_size=1, max_size=4))
def test_what_mltfr_adds_to_a_history_is_what_it_adds_alone(
    query_every: int, histories: list[list[int]]
) -> None:
    model = shared(query_every)
    added, _ = mltfr_of(model)(*inputs(histories, model))
    for row, history in zip(added.split([len(h) for h in histories]), histories, strict=True):
        alone, _ = mltfr_of(model)(*inputs([history], model))
        torch.testing.assert_close(row, alone, rtol=0, atol=2e-6)
        assert row.abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("query_every", EVERY)
@few
@given(history=HISTORY, data=st.data())
def test_a_later_item_changes_no_earlier_position(
    query_every: int, history: list[int], data: st.DataObject
) -> None:
    place = data.draw(st.integers(0, len(history) - 1))
    other = history.copy()
    other[place] = history[place] % NUM_ITEMS + 1
    model = shared(query_every, consensus=True)
    before, after = padded_hidden(model, padded([history])), padded_hidden(model, padded([other]))
    torch.testing.assert_close(after[0, :place], before[0, :place], rtol=0, atol=2e-6)
    assert (after[0, place:] - before[0, place:]).abs().amax(1).min() > 1e-4


@pytest.mark.parametrize("query_every", EVERY)
def test_in_float64_neither_batch_nor_padding_nor_future_shows(query_every: int) -> None:
    model, histories = exact(query_every), some_histories()
    with torch.no_grad():
        together = padded_hidden(model, padded(histories))
        for row, history in zip(together, histories, strict=True):
            for length in range(1, len(history) + 1):
                prefix = padded_hidden(model, padded([history[:length]]))
                torch.testing.assert_close(prefix[0], row[:length], rtol=0, atol=1e-12)


@pytest.mark.parametrize("query_every", EVERY)
def test_a_blocks_query_is_the_prefix_mean_at_its_first_position(query_every: int) -> None:
    model = shared(query_every)
    histories = some_histories()
    x, packing = inputs(histories, model)
    blocks = mltfr_of(model).blocks(x, packing)
    x = packing.unpack(x)
    positions, queries, occupied = blocks.positions, blocks.queries, blocks.occupied
    group = 0
    for user, history in enumerate(histories):
        for start in range(0, len(history), query_every):
            torch.testing.assert_close(queries[group], x[user, : start + 1].mean(0))
            here = min(query_every, len(history) - start)
            assert torch.equal(positions[group, :here], x[user, start : start + here])
            assert occupied[user, start // query_every]
            group += 1
    assert group == len(queries) == len(positions) == occupied.sum()


def test_prefix_mean_by_hand_and_blind_to_the_values_at_padding() -> None:
    x = torch.tensor([[[1.0], [3.0], [8.0], [99.0]], [[2.0], [99.0], [99.0], [99.0]]])
    valid = torch.tensor([[True, True, True, False], [True, False, False, False]])
    means = prefix_mean(x, valid)
    assert means[0, :3, 0].tolist() == [1, 2, 4]
    assert means[1, 0, 0] == 2


@pytest.mark.parametrize("consensus", [False, True])
@pytest.mark.parametrize("spread", [0.0, 0.3])
def test_every_parameter_gets_a_gradient(consensus: bool, spread: float) -> None:
    model = make(consensus=consensus, spread=spread)
    output = model(training_batch(some_histories()))
    assert isinstance(output, TrainingOutput)
    output.terms["loss"].sum.backward()
    largest = {
        name: float(p.grad.abs().max())
        for name, p in mltfr_of(model).named_parameters()
        if p.grad is not None
    }
    assert set(largest) == {name for name, _ in mltfr_of(model).named_parameters()}
    # A key's bias adds q.b to every logit of a row alike, and softmax does not change when all its
    # logits shift.
    key_biases = {name for name in largest if name.endswith("key.bias")}
    assert len(key_biases) == len(SHAPES)
    scale = max(largest.values())
    for name, value in largest.items():
        assert math.isfinite(value)
        if name in key_biases:
            assert value < 1e-6 * scale, name
        else:
            assert value > 1e-8 * scale, name


@pytest.mark.parametrize("top_k", [2, 7])
def test_the_filter_gets_a_gradient_at_any_k_that_is_allowed(top_k: int) -> None:
    model = make(top_k=top_k)
    model(training_batch(some_histories())).terms["loss"].sum.backward()
    for one in mltfr_of(model).selectors:
        assert one.projection.weight.grad.abs().max() > 1e-5
        assert one.log_temperature.grad.abs().max() > 1e-6


@pytest.mark.parametrize("fields", [{"top_k": 2}, {"top_k": None, "filter_ratio": 0.01}])
def test_the_filter_gets_a_gradient_however_few_tokens_are_kept(fields: dict[str, object]) -> None:
    model = make(**fields)
    model(training_batch(some_histories())).terms["loss"].sum.backward()
    assert all(one.projection.weight.grad.abs().max() > 1e-6 for one in mltfr_of(model).selectors)


def test_two_evaluations_agree_to_the_bit() -> None:
    item_ids = padded(some_histories())
    batch = RankingBatch(
        item_ids,
        torch.ones(len(item_ids), dtype=torch.int64),
        torch.zeros(0).long(),
        torch.zeros(0).long(),
    )
    for model in (shared(3, consensus=True), shared(4, shortlist=20)):
        with torch.no_grad():
            assert torch.equal(model(batch), model(batch))


def test_training_never_touches_a_table_or_the_consensus_expert() -> None:
    model = make(consensus=True, shortlist=40).train()
    mltfr = mltfr_of(model)
    hashes = [table_hash(mltfr.table(m).rows) for m in range(len(SHAPES))]
    assert mltfr.consensus is not None
    consensus = {name: t.clone() for name, t in mltfr.consensus.state_dict().items()}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    for step in range(4):
        optimizer.zero_grad()
        output = model(training_batch(some_histories(seed=step)))
        (output.terms["loss"].sum + output.terms["balance_loss"].sum).backward()
        optimizer.step()
    assert [table_hash(mltfr.table(m).rows) for m in range(len(SHAPES))] == hashes
    assert all(torch.equal(t, consensus[name]) for name, t in mltfr.consensus.state_dict().items())
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_tables_are_neither_parameters_nor_state() -> None:
    model = make(consensus=True, shortlist=55)
    mltfr = mltfr_of(model)
    tables = {mltfr.table(m).rows.data_ptr() for m in range(len(SHAPES))}
    assert not tables & {p.data_ptr() for p in model.parameters()}
    assert not tables & {t.data_ptr() for t in model.state_dict().values()}
    assert not [name for name in model.state_dict() if "table_" in name]
    assert {n for n in model.state_dict() if "shortlist" in n} == {
        "mltfr.selectors.0.shortlist.row_ids",
        "mltfr.selectors.1.shortlist.row_ids",
    }  # table 2 has 50 rows
    other = make(consensus=True, shortlist=55, spread=0.1)
    other.load_state_dict(model.state_dict())
    item_ids = padded(some_histories())
    assert torch.equal(padded_hidden(other, item_ids), padded_hidden(model, item_ids))


def test_gate_weights_sum_to_one_and_their_sums_are_additive() -> None:
    model = shared()
    histories = some_histories()
    positions = sum(map(len, histories))
    x, packing = inputs(histories, model)
    whole = routing_sums(mltfr_of(model)(x, packing)[1])
    gate = mltfr_of(model).router(x[:, None])[:, 0].detach()
    torch.testing.assert_close(gate.sum(-1), torch.ones(positions))
    assert gate.min() > 0
    torch.testing.assert_close(whole.gate, gate.sum(0), rtol=1e-5, atol=1e-5)
    assert whole.gate.sum() == pytest.approx(positions, rel=1e-6)
    assert whole.top.tolist() == torch.bincount(gate.argmax(-1), minlength=len(SHAPES)).tolist()
    assert whole.entropy.item() == pytest.approx(-(gate * gate.log()).sum().item(), rel=1e-5)
    blocks = [
        routing_sums(mltfr_of(model)(*inputs(histories[i : i + 2], model))[1])
        for i in range(0, len(histories), 2)
    ]
    for name in ("gate", "top", "entropy", "kept_entropy"):
        torch.testing.assert_close(
            sum(getattr(block, name) for block in blocks),
            getattr(whole, name),
            rtol=1e-5,
            atol=1e-5,
        )


def test_the_balance_term_is_one_a_position_when_balanced_and_pushes_off_the_loaded_expert() -> (
    None
):
    router = Router(RouterConfig(), DIM, 3)
    gate = torch.softmax(torch.randn(11, 3), -1).requires_grad_()
    assert router.balance_loss(gate).item() == pytest.approx(11, rel=1e-6)
    router.load.copy_(torch.tensor([0.5, 0.3, 0.2]))
    assert torch.autograd.grad(router.balance_loss(gate), gate)[0][0].tolist() == pytest.approx(
        [1.5, 0.9, 0.6]
    )
    router.update_load(torch.tensor([0.0, 1.0, 0.0]))
    assert router.load.tolist() == pytest.approx([0.45, 0.37, 0.18])


def test_a_batch_of_padding_costs_nothing_and_gives_finite_gradients() -> None:
    model = make(consensus=True)
    empty = SequenceBatch(torch.zeros(2, 1).long(), torch.zeros(2, 1).long(), torch.full((2,), -1))
    output = model(empty)
    (output.terms["loss"].sum + output.terms["balance_loss"].sum).backward()
    assert output.terms["loss"].sum.item() == 0
    assert output.routing.gate.sum() == 0
    assert all(
        p.grad is None or torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters()
    )


# --- the formulas, restated
# --------------------------------------------------------------------------------------


def norm_by_hand(row: Tensor, layer: nn.LayerNorm) -> Tensor:
    mean = row.mean()
    return (row - mean) / torch.sqrt(
        ((row - mean) ** 2).mean() + layer.eps
    ) * layer.weight + layer.bias


def kept_by_hand(mltfr: MLTFR, m: int, query: Tensor) -> tuple[list[int], Tensor]:
    """Row numbers of the K largest cosines of the whole table, best first, and their
    log-weights.
    """
    table, one, query = mltfr.table(m).rows, mltfr.selectors[m], query.detach()
    cosines = []
    for row in table:
        projected = (one.projection.weight @ row + one.projection.bias).detach()
        cosines.append(float(projected @ query / (projected.norm() * query.norm())))
    kept = sorted(range(len(table)), key=lambda v: -cosines[v])[: one.num_kept]
    scores = torch.tensor([cosines[v] for v in kept], dtype=torch.float64) / math.exp(
        float(one.log_temperature.detach())
    )
    return kept, scores - torch.log(torch.exp(scores).sum())


def attend_by_hand(
    core: ExpertCore, position: Tensor, rows: list[Tensor], log_weights: Tensor
) -> Tensor:
    size = core.query.weight.shape[0] // core.num_heads
    query = core.query.weight @ position + core.query.bias
    mixed = []
    for head in range(core.num_heads):
        block = slice(head * size, (head + 1) * size)
        keys = [(core.key.weight @ row + core.key.bias)[block] for row in rows]
        values = [(core.value.weight @ row + core.value.bias)[block] for row in rows]
        logits = torch.stack([query[block] @ key / math.sqrt(size) for key in keys]) + log_weights
        weights = torch.exp(logits) / torch.exp(logits).sum()
        mixed.append(sum(w * v for w, v in zip(weights, values, strict=True)))
    return core.out.weight @ torch.cat(mixed) + core.out.bias


@torch.no_grad()
def forward_by_hand(mltfr: MLTFR, x: Tensor, history_lengths: list[int]) -> Tensor:
    """What is added to block 0's output, position by position."""
    added = torch.zeros_like(x)
    for user, length in enumerate(history_lengths):
        for t in range(length):
            start = t // mltfr.config.filter.query_every * mltfr.config.filter.query_every
            query = sum(x[user, s] for s in range(start + 1)) / (start + 1)
            all_rows: list[Tensor] = []
            all_weights: list[Tensor] = []
            experts = []
            for m, core in enumerate(mltfr.cores):
                kept, log_weights = kept_by_hand(mltfr, m, query)
                linear, layer_norm = mltfr.adapters[m].linear, mltfr.adapters[m].norm
                rows = [
                    norm_by_hand(linear.weight @ mltfr.table(m).rows[v] + linear.bias, layer_norm)
                    for v in kept
                ]
                experts.append(attend_by_hand(core, x[user, t], rows, log_weights))
                all_rows += rows
                all_weights.append(log_weights)
            gate = torch.exp(mltfr.router.linear.weight @ x[user, t] + mltfr.router.linear.bias)
            gate = gate / gate.sum()
            added[user, t] = sum(g * e for g, e in zip(gate, experts, strict=True))
            if mltfr.consensus is not None:
                consensus = attend_by_hand(
                    mltfr.consensus, x[user, t], all_rows, torch.cat(all_weights)
                )
                added[user, t] += mltfr.config.consensus.weight * consensus
    return added


@pytest.mark.parametrize("consensus", [False, True])
@pytest.mark.parametrize("query_every", [1, 3])
def test_forward_equals_the_formulas(query_every: int, consensus: bool) -> None:
    model = make(query_every, consensus=consensus).double()
    histories = [[3, 7, 7, 1, 30], [5, 2], [9]]
    x, packing = inputs(histories, model)
    assert x.dtype == torch.float64
    with torch.no_grad():
        added, _ = mltfr_of(model)(x, packing)
    padded_x = packing.unpack(x)
    expected = forward_by_hand(mltfr_of(model), padded_x, [len(h) for h in histories])
    torch.testing.assert_close(packing.unpack(added), expected, rtol=0, atol=1e-10)
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize("query_every", [1, 4])
def test_fp32_stays_near_the_formulas(query_every: int) -> None:
    model = make(query_every, consensus=True)
    x, packing = inputs([[3, 7, 7, 1, 30], [5, 2]], model)
    with torch.no_grad():
        added, _ = mltfr_of(model)(x, packing)
    padded_x = packing.unpack(x).double()
    expected = forward_by_hand(mltfr_of(copy.deepcopy(model).double()), padded_x, [5, 2])
    torch.testing.assert_close(packing.unpack(added).double(), expected, rtol=0, atol=1e-5)


def test_kept_tokens_are_the_exact_top_k_by_cosine() -> None:
    model = make(3).double()
    mltfr = mltfr_of(model)
    queries = queries_of(mltfr, *inputs(some_histories(4), model))
    with torch.no_grad():
        for m, kept in enumerate(kept_tokens(mltfr, queries)):
            assert kept.kept.shape == kept.log_weights.shape == (len(queries), TOP_K)
            for g, query in enumerate(queries):
                expected, log_weights = kept_by_hand(mltfr, m, query)
                assert kept.kept[g].tolist() == expected
                torch.testing.assert_close(
                    kept.log_weights[g].double(), log_weights, rtol=0, atol=1e-5
                )


def test_scaling_a_query_changes_neither_tokens_nor_weights() -> None:
    mltfr = mltfr_of(shared())
    queries = torch.randn(5, DIM)
    for one, other in zip(
        kept_tokens(mltfr, queries), kept_tokens(mltfr, queries * 37.0), strict=True
    ):
        assert torch.equal(one.kept, other.kept)
        torch.testing.assert_close(one.log_weights, other.log_weights, rtol=0, atol=1e-5)


def test_a_lower_temperature_sharpens_the_weights() -> None:
    mltfr = mltfr_of(make())
    queries = torch.randn(5, DIM)
    before = [kept.log_weights.exp().amax(1) for kept in kept_tokens(mltfr, queries)]
    for one in mltfr.selectors:
        one.log_temperature.data.sub_(2.0)
    for old, kept in zip(before, kept_tokens(mltfr, queries), strict=True):
        assert (kept.log_weights.exp().amax(1) > old).all()
        torch.testing.assert_close(kept.log_weights.exp().sum(1), torch.ones(5))


def test_a_temperature_that_is_not_learned_is_no_parameter() -> None:
    mltfr = mltfr_of(make(learn_temperature=False, temperature=0.25))
    assert not [name for name, _ in mltfr.named_parameters() if "temperature" in name]
    assert mltfr.selectors[0].temperature.item() == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [(0.05, (3, 4, 2)), (0.001, (2, 2, 2)), (1.0, (60, 90, 50)), (0.1, (6, 9, 5))],
)
def test_filter_ratio_gives_k(ratio: float, expected: tuple[int, ...]) -> None:
    model = make(top_k=None, filter_ratio=ratio)
    assert (
        tuple(one.num_kept for one in mltfr_of(model).selectors)
        == expected
        == tuple(max(2, round(ratio * v)) for v, _ in SHAPES)
    )
    kept = kept_tokens(mltfr_of(model), torch.randn(3, DIM))
    assert tuple(k.kept.shape[1] for k in kept) == expected
    assert all(len(set(row.tolist())) == k.kept.shape[1] for k in kept for row in k.kept)


EXACT = torch.float64


def test_searching_in_chunks_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, rows = (
        F.normalize(torch.randn(9, DIM), dim=-1),
        F.normalize(torch.randn(40, DIM), dim=-1),
    )
    whole, relevance = search(queries, rows, 5), row_relevance(queries, rows, as_they_are, EXACT)
    exact = search_rows(queries, rows, as_they_are, 5)
    assert torch.equal(exact[1], whole)
    torch.testing.assert_close(relevance, (queries @ rows.T).amax(0))
    for elements in (1, 80, 130):
        monkeypatch.setattr(searching, "CACHED_ELEMENTS", elements)
        assert torch.equal(search(queries, rows, 5), whole)
        assert all(
            torch.equal(a, b)
            for a, b in zip(search_rows(queries, rows, as_they_are, 5), exact, strict=True)
        )
        assert torch.equal(row_relevance(queries, rows, as_they_are, EXACT), relevance)
    assert row_relevance(queries[:0], rows, as_they_are).tolist() == [-1.0] * 40
    assert search(queries[:0], rows, 5).shape == (0, 5)
    assert search_rows(queries[:0], rows, as_they_are, 5)[1].shape == (0, 5)


def as_they_are(rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return rows.to(dtype)


def test_equal_rows_are_kept_by_number_however_many() -> None:
    """More equal rows than are looked at beside the best: the lower numbers win, in parts of the
    table as in the whole.
    """
    torch.manual_seed(0)
    query, rows = torch.randn(7, DIM), torch.randn(100, DIM)
    rows[5:95] = rows[3]
    rows = F.normalize(rows, dim=-1)
    for count in (3, 8, 40):
        scores, ids = search_rows(query, rows, as_they_are, count)
        exact = (F.normalize(query.double(), dim=-1) @ rows.double().T).float()
        expected = exact.sort(dim=1, descending=True, stable=True)
        assert torch.equal(ids, expected.indices[:, :count])
        assert torch.equal(scores, expected.values[:, :count])
        blocks = [
            search_rows(query, rows[a:b], as_they_are, count)
            for a, b in ((0, 1), (1, 50), (50, 100))
        ]
        offsets = (0, 1, 50)
        result = torch.cat([p[1] + start for p, start in zip(blocks, offsets, strict=True)], dim=1)
        assert torch.equal(best(torch.cat([p[0] for p in blocks], dim=1), result, count)[1], ids)


@few
@given(
    width=st.integers(1, 3000),
    count=st.integers(1, 20),
    kinds=st.sampled_from([3, 50, 1 << 20]),
    seed=st.integers(0, 1000),
)
def test_the_largest_by_groups_are_the_largest(
    width: int, count: int, kinds: int, seed: int
) -> None:
    """Also where many scores are equal."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(kinds, (4, width), generator=generator).float()
    values, indices = top_of(scores, min(count, width))
    assert torch.equal(values, scores.sort(dim=1, descending=True).values[:, :count])
    assert torch.equal(scores.gather(1, indices), values)
    assert all(len(set(row)) == len(row) for row in indices.tolist())
    expected = scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
    assert torch.equal(largest(scores, min(count, width)), expected)


@pytest.mark.parametrize("spread", [1.0, 1e-4, 1e-6])  # the last: fp32 tells hardly a row apart
def test_a_shortlist_is_that_of_float64(spread: float) -> None:
    torch.manual_seed(0)
    config = FilterConfig(top_k=4, shortlist_size=40)
    selector, rows = UserGuided(config, 300, 12, DIM), torch.randn(300, 12)
    rows = rows[:1] + spread * rows
    rows[200:] = rows[100:200]  # equal ones: the lower numbers win
    queries = [torch.randn(5, DIM), torch.randn(3, DIM)]
    selector.refresh(queries, ReplicatedTable(rows), ALONE)
    relevance = row_relevance(torch.cat(queries), rows, selector.project, EXACT)
    expected = relevance.sort(descending=True, stable=True).indices[:40].sort().values
    assert selector.shortlist is not None
    assert torch.equal(selector.shortlist.row_ids, expected)


def test_kept_rows_are_projected_once_and_have_the_gradients_of_a_second_time() -> None:
    torch.manual_seed(0)
    config = FilterConfig(top_k=3, shortlist_size=40, temperature=0.3)
    selector, rows = UserGuided(config, 90, 12, DIM).double(), torch.randn(90, 12).double()
    query, weights = torch.randn(7, DIM).double().requires_grad_(), torch.randn(7, 3).double()
    parameters = [query, *selector.projection.parameters()]
    given = []
    selector.projection.register_forward_hook(lambda _, args, out: given.append(len(args[0])))

    def gradients(chosen: Selection) -> tuple[Tensor, ...]:
        return torch.autograd.grad((weights * chosen.log_weights).sum(), parameters)

    result = selector(Queries(query), ReplicatedTable(rows))
    assert result.kept is not None
    assert given == [40, len(result.candidates)]
    assert len(result.candidates) < 40
    again = selector.select(Queries(query), result.candidates, result.row_ids, kept=result.kept)
    torch.testing.assert_close(result.log_weights, again.log_weights, rtol=0, atol=1e-12)
    for one, other in zip(gradients(result), gradients(again), strict=True):
        assert one.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_rows_that_are_trained_have_their_gradient() -> None:
    torch.manual_seed(0)
    selector = UserGuided(FilterConfig(top_k=3, shortlist_size=40), 90, 12, DIM)
    rows = torch.randn(40, 12, requires_grad=True)
    chosen = selector.select(Queries(torch.randn(7, DIM)), rows, torch.arange(40))
    (gradient,) = torch.autograd.grad(chosen.log_weights[:, 0].sum(), [rows])
    kept = gradient.abs().sum(1) > 0
    assert 3 <= int(kept.sum()) <= len(chosen.row_ids) < 40
    assert set(kept.nonzero()[:, 0].tolist()) <= set(chosen.row_ids.tolist())


@pytest.mark.parametrize("query_every", [1, 3, 4])
@pytest.mark.parametrize("consensus", [False, True])
def test_packed_positions_give_what_whole_blocks_give(
    query_every: int, consensus: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dropout's masks too, and the gradients."""
    model = make(query_every, consensus=consensus, shortlist=45).train()
    mltfr = mltfr_of(model)
    x, packing = inputs(some_histories(7), model)

    def run() -> list[Tensor]:
        torch.manual_seed(5)
        leaf = x.clone().requires_grad_()
        added, routing = mltfr(leaf, packing)
        weights = torch.linspace(-1, 1, added.numel()).view_as(added)
        total = (added * weights).sum() + (routing.gate**2).sum()
        trained = [p for p in mltfr.parameters() if p.requires_grad]
        return [added, routing.gate, *torch.autograd.grad(total, [leaf, *trained])]

    packed = run()
    read = []
    monkeypatch.setattr(MLTFR, "_reads_in_place", lambda *_: read.append(1) or False)
    whole = run()
    assert read
    for one, other in zip(packed, whole, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# --- shortlist and explanation
# -----------------------------------------------------------------------------------


def test_set_shortlist_keeps_the_rows_of_highest_relevance() -> None:
    mltfr = mltfr_of(make(shortlist=5))
    relevance = [torch.zeros(rows) for rows, _ in SHAPES]
    relevance[0][[50, 7, 33]] = torch.tensor([0.9, 0.5, 0.7])
    relevance[1][:] = torch.arange(90.0)
    set_shortlists(mltfr, relevance)
    lists = [selector.shortlist for selector in mltfr.selectors]
    assert lists[0].row_ids.tolist() == [0, 1, 7, 33, 50]  # ties go to the lower row number
    assert lists[1].row_ids.tolist() == [85, 86, 87, 88, 89]
    assert lists[2].row_ids.tolist() == [0, 1, 2, 3, 4]
    assert mltfr.uses_shortlist
    assert torch.equal(lists[0].candidates(mltfr.table(0)), mltfr.table(0).rows[lists[0].row_ids])


def test_a_shortlist_that_holds_the_top_k_gives_the_full_search() -> None:
    full, short = make(3, consensus=True), make(3, consensus=True, shortlist=45)
    short.load_state_dict(full.state_dict(), strict=False)
    histories = some_histories(3)
    x, packing = inputs(histories, full)
    queries = queries_of(mltfr_of(full), x, packing)
    needed = []
    for kept, (rows, _) in zip(kept_tokens(mltfr_of(full), queries), SHAPES, strict=True):
        marks = torch.zeros(rows)
        marks[kept.kept.flatten()] = 1.0
        needed.append(marks)
    assert all(marks.sum() < 45 for marks in needed)
    set_shortlists(mltfr_of(short), needed)
    with torch.no_grad():
        torch.testing.assert_close(
            mltfr_of(short)(x, packing)[0], mltfr_of(full)(x, packing)[0], rtol=0, atol=1e-6
        )
        for m in range(len(SHAPES)):
            result = kept_tokens(mltfr_of(short), queries)[m].kept
            assert torch.equal(result, kept_tokens(mltfr_of(full), queries)[m].kept)
    assert recall_of(mltfr_of(short), queries) == [1.0] * len(SHAPES)


def test_shortlist_recall_is_the_share_of_the_exact_top_k() -> None:
    model = make(3, shortlist=20)
    x, packing = inputs(some_histories(3), model)
    mltfr = mltfr_of(model)
    queries = queries_of(mltfr, x, packing)
    recall = recall_of(mltfr, queries[:3])
    for m in range(len(SHAPES)):
        exact = [set(kept_by_hand(mltfr, m, query)[0]) for query in queries[:3]]
        assert recall[m] == pytest.approx(
            sum(len(kept & set(range(20))) / TOP_K for kept in exact) / 3
        )
    # The rows furthest from all queries:
    set_shortlists(mltfr, [-r for r in relevance_of(mltfr, x, packing)])
    assert recall_of(mltfr, queries) == [0.0] * len(SHAPES)


def test_relevance_puts_a_single_users_top_k_on_the_shortlist() -> None:
    model = make(16, shortlist=TOP_K)  # one query a user
    x, packing = inputs([[4, 8, 15]], model)
    mltfr = mltfr_of(model)
    relevance = relevance_of(mltfr, x, packing)
    assert [len(r) for r in relevance] == [rows for rows, _ in SHAPES]
    set_shortlists(mltfr, relevance)
    assert recall_of(mltfr, queries_of(mltfr, x, packing)) == [1.0, 1.0, 1.0]


def test_a_shortlist_as_long_as_the_table_is_the_whole_table() -> None:
    mltfr = mltfr_of(make(shortlist=1000))
    assert not mltfr.uses_shortlist
    assert not [name for name in mltfr.state_dict() if "shortlist" in name]
    assert mltfr.refresh([inputs(some_histories(2), shared())], ALONE).tolist() == [1.0] * 3


@pytest.mark.parametrize("shortlist", [None, 40])
@pytest.mark.parametrize("query_every", EVERY)
def test_explain_agrees_with_forward(query_every: int, shortlist: int | None) -> None:
    model = make(query_every, shortlist=shortlist)
    mltfr = mltfr_of(model)
    histories = some_histories()
    x, packing = inputs(histories, model)
    if shortlist:
        set_shortlists(mltfr, relevance_of(mltfr, x, packing))
    explanations = model.explain(padded(histories))
    with torch.no_grad():
        added, _ = mltfr(x, packing)
        x, added = packing.unpack(x), packing.unpack(added)
        for user, (history, result) in enumerate(zip(histories, explanations, strict=True)):
            last = len(history) - 1
            position = x[user, last].view(1, 1, DIM)
            experts = []
            for m, (ids, weights) in enumerate(
                zip(result.kept_ids, result.kept_weights, strict=True)
            ):
                assert weights.sum().item() == pytest.approx(1, rel=1e-5)
                assert (weights[:-1] >= weights[1:] - 1e-6).all()  # best first
                rows = mltfr.adapters[m](mltfr.table(m).rows[ids])
                experts.append(
                    mltfr.cores[m](
                        position, [ExpertRows(rows, torch.arange(TOP_K)[None], weights.log()[None])]
                    )[0, 0]
                )
            mixed = sum(g * e for g, e in zip(result.gate_weights, experts, strict=True))
            torch.testing.assert_close(mixed, added[user, last], rtol=0, atol=1e-5)


# --- the whole recommender
# ---------------------------------------------------------------------------------------


def test_scores_are_products_of_the_last_hidden_state_and_item_vectors() -> None:
    model = shared()
    histories = [[1, 2, 3, 4, 5], [6], [7, 8]]
    none = torch.zeros(0).long()
    with torch.no_grad():
        scores = model(RankingBatch(padded(histories), torch.tensor([1, 1, 1]), none, none))
        hidden = padded_hidden(model, padded(histories))
    assert scores.shape == (3, NUM_ITEMS + 1)
    assert torch.isneginf(scores[:, 0]).all()
    for user, history in enumerate(histories):
        expected = model.backbone.item_embedding.weight[1:] @ hidden[user, len(history) - 1]
        torch.testing.assert_close(scores[user, 1:], expected)


@pytest.mark.parametrize("name", ["cross_entropy", "bce"])
def test_the_loss_is_a_weighted_sum_over_real_positions(name: str) -> None:
    loss = LossConfig(name=name, num_negatives=2)
    model = with_loss(make(), loss)
    histories = some_histories(3)
    batch = training_batch(histories)
    batch = batch._replace(negative_ids=torch.randint(1, NUM_ITEMS + 1, (*batch.item_ids.shape, 2)))
    weights = torch.rand(batch.item_ids.shape)
    vectors = model.backbone.item_embedding.weight
    with torch.no_grad():
        hidden = padded_hidden(model, batch.item_ids)
        expected = 0.0
        for user, history in enumerate(histories):
            for t, target in enumerate(history[1:]):
                state = hidden[user, t]
                if name == "cross_entropy":
                    value = F.cross_entropy(vectors[1:] @ state, torch.tensor(target - 1))
                else:
                    negatives = vectors[batch.negative_ids[user, t]] @ state
                    value = -F.logsigmoid(vectors[target] @ state) - F.logsigmoid(-negatives).mean()
                expected += float(weights[user, t] * value)
        assert model(batch, weights).terms["loss"].sum.item() == pytest.approx(expected, rel=1e-5)
        assert model(batch).terms["loss"].sum.item() == pytest.approx(
            model(batch, torch.ones_like(weights)).terms["loss"].sum.item(), rel=1e-6
        )


def test_the_bare_backbone_has_no_routing() -> None:
    bare = new_model(
        BackboneConfig(hidden_dim=DIM),
        MLTFRConfig(enabled=False),
        LossConfig(),
        num_items=NUM_ITEMS,
        max_len=MAX_LEN,
        table_rows=[],
    ).eval()
    batch = training_batch(some_histories(3))
    output = bare(batch)
    assert output.routing is None
    hidden, _, _ = bare.hidden(batch.item_ids)
    targets = batch.target_ids[batch.target_ids != 0]
    expected = full_cross_entropy(
        hidden, bare.backbone.item_embedding.weight[1:], targets, torch.ones(len(targets))
    )
    assert output.terms["loss"].sum.item() == pytest.approx(expected.item())


def test_all_cores_start_equal_and_apart() -> None:
    mltfr = mltfr_of(make(spread=0.0))
    first, *others = (core.state_dict() for core in mltfr.cores)
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)
        assert all(first[name].data_ptr() != other[name].data_ptr() for name in first)
