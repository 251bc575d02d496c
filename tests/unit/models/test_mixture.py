"""The mixture's options: experts of a table, top-k routing, null expert, expert dropout, lambda,
group, noise.
"""

from __future__ import annotations

import pytest
import torch
from support import new_mltfr
from torch import Tensor

from mltfr_dist.config import (
    ConsensusConfig,
    ExpertConfig,
    FilterConfig,
    MLTFRConfig,
    PublishedConfig,
    RouterConfig,
)
from mltfr_dist.models.experts import ExpertCore, ExpertRows
from mltfr_dist.models.mltfr import MLTFR
from mltfr_dist.models.packing import Packing
from mltfr_dist.models.router import Router, router_class
from mltfr_dist.models.routing import routing_sums
from mltfr_dist.models.selectors import Queries
from mltfr_dist.published.experts import mean_rows, pooled
from mltfr_dist.published.selecting import WeightedSelection
from mltfr_dist.routers import ROUTERS

DIM, NAMES = 8, ("one", "two", "three")
SHAPES = ((40, 6), (30, 10), (20, 5))
ITEMS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0]])


def make(
    *,
    top_k: int = 4,
    expert: dict[str, object] | None = None,
    router: dict[str, object] | None = None,
    consensus: dict[str, object] | None = None,
    filter_fields: dict[str, object] | None = None,
    published: PublishedConfig | None = None,
) -> MLTFR:
    torch.manual_seed(0)
    config = MLTFRConfig(
        tables=NAMES,
        filter=FilterConfig(
            top_k=top_k, query_every=2, shortlist_size=None, **(filter_fields or {})
        ),
        expert=ExpertConfig(num_heads=2, head_dim=4, **(expert or {})),
        router=RouterConfig(**(router or {})),
        consensus=ConsensusConfig(**(consensus or {})),
    )
    made = new_mltfr(config, DIM, [torch.randn(*shape) for shape in SHAPES], published)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "temperature" not in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return made.eval()


def embeddings() -> Tensor:
    return (
        torch.randn(2, 5, DIM, generator=torch.Generator().manual_seed(3)) * (ITEMS != 0)[..., None]
    )


def added(mltfr: MLTFR) -> Tensor:
    packing = Packing(ITEMS)
    output = packing.unpack(mltfr(packing.pack(embeddings()), packing)[0])
    assert isinstance(output, Tensor)
    return output


def gates(mltfr: MLTFR) -> Tensor:
    weights = mltfr.router(embeddings())
    assert isinstance(weights, Tensor)
    return weights


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("fields", [{}, {"top_k": 2}, {"null_expert": True, "expert_dropout": 0.7}])
def test_every_router_gives_weights_that_sum_to_one(name: str, fields: dict[str, object]) -> None:
    mltfr = make(router={"name": name} | fields)
    assert type(mltfr.router) is router_class(name)
    weights = gates(mltfr.train())
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 5))
    assert (weights >= 0).all()
    if "top_k" in fields:
        assert ((weights > 0).sum(-1) == 2).all()


def test_the_sigmoid_gate_is_each_affinity_over_their_sum() -> None:
    mltfr = make(router={"name": "sigmoid"})
    affinity = torch.sigmoid(mltfr.router.linear(embeddings()))
    expected = affinity / affinity.sum(-1, keepdim=True)
    torch.testing.assert_close(gates(mltfr), expected)
    assert (expected - gates(make())).abs().max() > 1e-3


def test_experts_of_a_table_share_its_filter_and_start_apart_by_their_adapters_only() -> None:
    torch.manual_seed(0)
    config = MLTFRConfig(
        tables=NAMES, filter=FilterConfig(top_k=4), expert=ExpertConfig(per_table=2)
    )
    mltfr = new_mltfr(config, DIM, [torch.randn(*shape) for shape in SHAPES])
    assert (len(mltfr.selectors), len(mltfr.cores), len(mltfr.adapters)) == (3, 6, 6)
    for name, value in mltfr.cores[0].state_dict().items():
        assert all(torch.equal(core.state_dict()[name], value) for core in mltfr.cores)
    assert not torch.equal(mltfr.adapters[0].linear.weight, mltfr.adapters[1].linear.weight)
    assert mltfr.gate_names(NAMES) == ["one.0", "one.1", "two.0", "two.1", "three.0", "three.1"]
    assert mltfr.experts_of([0, 2]) == [0, 1, 4, 5]


def test_the_output_is_the_gated_sum_of_every_tables_experts() -> None:
    mltfr = make(expert={"per_table": 2}, router={"null_expert": True})
    x = embeddings()
    blocks = mltfr.blocks(Packing(ITEMS).pack(x), Packing(ITEMS))
    positions, queries, occupied = blocks.positions, blocks.queries, blocks.occupied
    attended = mltfr.attended(mltfr.selections(Queries(queries)))
    assert len(attended) == 6
    assert torch.equal(attended[2].kept, attended[3].kept)  # one filter
    weights = mltfr.router(positions)
    assert weights.shape[-1] == 7
    expected = sum(
        weights[..., e, None] * core(positions, [attended[e]]) for e, core in enumerate(mltfr.cores)
    )
    spread = torch.zeros(2, 3, 2, DIM)
    spread[occupied] = expected
    torch.testing.assert_close(added(mltfr), spread.flatten(1, 2)[:, :5] * (ITEMS != 0)[..., None])


@pytest.mark.parametrize("null_expert", [False, True])
def test_top_k_routing_leaves_the_best_gates_renormalised(null_expert: bool) -> None:
    dense, sparse = (make(router={"null_expert": null_expert, "top_k": k}) for k in (None, 2))
    for weights, full in zip(gates(sparse).flatten(0, 1), gates(dense).flatten(0, 1), strict=True):
        best = full.topk(2).indices
        expected = torch.zeros_like(full)
        expected[best] = full[best] / full[best].sum()
        torch.testing.assert_close(weights, expected)
    sparse.zero_grad()
    added(sparse).square().sum().backward()
    assert sparse.router.linear.weight.grad.abs().max() > 1e-6


def test_a_position_can_do_without_experts() -> None:
    mltfr = make(router={"null_expert": True})
    with torch.no_grad():
        mltfr.router.linear.bias[-1] = 100.0
    assert added(mltfr).abs().max() < 1e-30
    assert mltfr.gate_names(NAMES)[-1] == "none"
    sums = routing_sums(mltfr(Packing(ITEMS).pack(embeddings()), Packing(ITEMS))[1])
    assert sums.top.tolist() == [0, 0, 0, 8]


def test_expert_dropout_leaves_out_whole_experts_in_training_only_and_never_all() -> None:
    plain, dropped = make(), make(router={"expert_dropout": 0.7})
    assert torch.equal(gates(plain), gates(dropped))
    router = Router(RouterConfig(expert_dropout=0.7, null_expert=True), DIM, 3).train()
    weights = router(torch.randn(500, 2, DIM))
    torch.testing.assert_close(weights.sum(-1), torch.ones(500, 2))
    out = weights == 0
    assert torch.equal(out[:, 0], out[:, 1])  # all positions of a query alike
    assert not out[..., -1].any()
    assert 0.6 < float(out[..., :3].float().mean()) < 0.8
    without_null = Router(RouterConfig(expert_dropout=0.9), DIM, 3).train()
    assert torch.isfinite(without_null(torch.randn(500, 2, DIM))).all()


def test_a_second_softmax_confines_the_gate() -> None:
    once, twice = make(), make(published=PublishedConfig(double_softmax=True))
    torch.testing.assert_close(gates(twice), torch.softmax(gates(once), -1))
    assert float(gates(twice).detach().max()) < 1 / (1 + 2 / torch.e) + 1e-6


def test_a_learned_lambda_starts_as_given_and_gets_a_gradient() -> None:
    fixed, learned = (
        make(consensus={"weight": 0.4, "learn_weight": learn}) for learn in (False, True)
    )
    for mltfr in (fixed, learned):
        mltfr.add_consensus(
            {name: torch.ones_like(p) for name, p in mltfr.cores[0].named_parameters()}
        )
    torch.testing.assert_close(added(learned), added(fixed))
    added(learned).sum().backward()
    assert learned.consensus_weight.grad.abs() > 1e-4
    assert "consensus_weight" in dict(learned.named_parameters())
    assert "consensus_weight" not in dict(fixed.named_parameters())


def test_the_consensus_reads_its_groups_tables_alone() -> None:
    def consensus_part(mltfr: MLTFR, weight: float) -> Tensor:
        object.__setattr__(mltfr.config.consensus, "weight", weight)
        return added(mltfr)

    mltfr = make(consensus={"weight": 1.0})
    mltfr.add_consensus(
        {name: p.detach() + 0.1 for name, p in mltfr.cores[0].named_parameters()}, [0, 2]
    )
    before = consensus_part(mltfr, 1.0) - consensus_part(mltfr, 0.0)
    with torch.no_grad():
        mltfr.selectors[1].projection.weight.mul_(-1)
    after = consensus_part(mltfr, 1.0) - consensus_part(mltfr, 0.0)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        mltfr.selectors[2].projection.weight.mul_(-1)
    assert (consensus_part(mltfr, 1.0) - consensus_part(mltfr, 0.0) - before).abs().max() > 1e-3


def test_noise_moves_the_choice_in_training_only_and_dies_away() -> None:
    config = FilterConfig(noise=0.5, noise_steps=10)
    assert [config.noise_scale(step) for step in (0, 5, 10, 99)] == [0.5, 0.25, 0.0, 0.0]
    assert FilterConfig(noise=0.5).noise_scale(99) == 0.5
    quiet, noisy = make(), make(filter_fields={"noise": 0.5, "noise_steps": 10})
    noisy.load_state_dict(quiet.state_dict(), strict=False)
    assert torch.equal(added(quiet), added(noisy))  # evaluation
    for mltfr in (quiet, noisy):
        mltfr.train()
        for module in mltfr.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    assert not torch.allclose(added(quiet), added(noisy))
    assert torch.equal(added(noisy), added(noisy))  # the same seed, step, user and table
    for _ in range(10):
        noisy.after_update(None)
    assert torch.equal(added(quiet), added(noisy))


def test_a_pooled_memory_weighs_a_row_by_how_often_it_is_kept() -> None:
    """Held once with added weights, or once for each query: the same attention."""
    core = ExpertCore(ExpertConfig(num_heads=2, head_dim=4, dropout=0.0), DIM, DIM).double().eval()
    rows, x = torch.randn(6, DIM).double(), torch.randn(3, 2, DIM).double()
    places = torch.tensor([[0, 1], [1, 2], [1, 5]])
    log_weights = torch.randn(3, 2).double().log_softmax(-1)
    spelled_out = ExpertRows(rows[places.flatten()], None, log_weights.flatten()[None])
    torch.testing.assert_close(
        core(x, [pooled(ExpertRows(rows, places, log_weights))]), core(x, [spelled_out])
    )
    factors = torch.rand(3, 2).double()
    weighted = WeightedSelection(rows, torch.arange(6), places, torch.zeros(3, 2).double(), factors)
    scaled = pooled(weighted.attended(torch.nn.Identity()))
    assert scaled.kept is None
    torch.testing.assert_close(scaled.rows, rows[places.flatten()] * factors.flatten()[:, None])


def test_the_published_consensus_reads_the_mean_of_the_kth_rows() -> None:
    rows, places = torch.randn(2, 5, 3), torch.tensor([[[0, 1], [2, 2]], [[4, 3], [1, 0]]])
    attended = [ExpertRows(r, p, torch.zeros(2, 2)) for r, p in zip(rows, places, strict=True)]
    (mean,) = mean_rows(attended)
    gathered = mean.rows[mean.kept]
    torch.testing.assert_close(gathered[0, 0], (rows[0, 0] + rows[1, 4]) / 2)
    torch.testing.assert_close(gathered[1, 1], (rows[0, 2] + rows[1, 0]) / 2)
    assert mean.log_weights.abs().max() < 1e-6
