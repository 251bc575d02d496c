"""The Fisher-weighted merge and the frozen consensus expert."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import new_mltfr
from torch import Tensor

from mltfr_dist.config import ConsensusConfig, ExpertConfig, FilterConfig, MLTFRConfig
from mltfr_dist.models.consensus import State, freeze, merge
from mltfr_dist.models.experts import ExpertCore
from mltfr_dist.models.mltfr import MLTFR
from mltfr_dist.models.packing import Packing
from mltfr_dist.models.selectors import Queries

few = settings(max_examples=30, deadline=None, derandomize=True)
SEED = st.integers(0, 10_000)
DIM = 16


def random_state(generator: torch.Generator, *, positive: bool = False) -> State:
    state = {
        name: torch.randn(shape, generator=generator)
        for name, shape in (("a.weight", (3, 4)), ("a.bias", (3,)))
    }
    return {name: t.square() for name, t in state.items()} if positive else state


def drawn(seed: int, count: int) -> tuple[list[State], list[State]]:
    generator = torch.Generator().manual_seed(seed)
    cores = [random_state(generator) for _ in range(count)]
    return cores, [random_state(generator, positive=True) for _ in range(count)]


@few
@given(SEED, st.integers(1, 5), st.floats(-20, 20))
def test_equal_experts_merge_to_themselves(seed: int, count: int, exponent: float) -> None:
    (core, *_), fishers = drawn(seed, count)
    fishers[0] = {name: t * 10.0**exponent for name, t in fishers[0].items()}
    merged = merge([core] * count, fishers)
    assert all(torch.equal(merged[name], core[name]) for name in core)


@few
@given(SEED, st.integers(2, 4), st.floats(-10, 10))
def test_the_scale_of_one_experts_fisher_does_not_matter(
    seed: int, count: int, exponent: float
) -> None:
    cores, fishers = drawn(seed, count)
    before = merge(cores, fishers)
    fishers[1] = {name: t * 10.0**exponent for name, t in fishers[1].items()}
    after = merge(cores, fishers)
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-4, atol=1e-5)


@few
@given(SEED, st.integers(1, 4))
def test_a_merged_value_lies_between_the_experts(seed: int, count: int) -> None:
    cores, fishers = drawn(seed, count)
    for name, value in merge(cores, fishers).items():
        stacked = torch.stack([core[name] for core in cores])
        assert (value >= stacked.amin(0) - 1e-6).all()
        assert (value <= stacked.amax(0) + 1e-6).all()
        assert value.dtype == torch.float32


def test_two_experts_by_hand() -> None:
    cores = [{"w": torch.tensor([1.0, 10.0, 4.0])}, {"w": torch.tensor([3.0, 20.0, 8.0])}]
    fishers = [{"w": torch.tensor([2.0, 4.0, 0.0])}, {"w": torch.tensor([30.0, 0.0, 0.0])}]
    # Divided by their means 2 and 10: (1, 2, 0) and (3, 0, 0).
    expected = [(1 * 1 + 3 * 3) / 4, 10.0, 6.0]
    assert merge(cores, fishers)["w"].tolist() == pytest.approx(expected)


def test_the_mean_is_taken_over_the_whole_expert_and_not_each_parameter() -> None:
    cores = [
        {"a": torch.tensor([0.0]), "b": torch.tensor([0.0])},
        {"a": torch.tensor([1.0]), "b": torch.tensor([1.0])},
    ]
    fishers = [
        {"a": torch.tensor([3.0]), "b": torch.tensor([1.0])},
        {"a": torch.tensor([2.0]), "b": torch.tensor([2.0])},
    ]
    merged = merge(cores, fishers)  # (1.5, 0.5) and (1, 1)
    assert merged["a"].item() == pytest.approx(1 / 2.5)
    assert merged["b"].item() == pytest.approx(1 / 1.5)


def test_entries_without_any_fisher_take_the_plain_mean() -> None:
    cores, fishers = drawn(1, 3)
    for fisher in fishers:
        fisher["a.bias"] = torch.zeros(3)
    torch.testing.assert_close(
        merge(cores, fishers)["a.bias"], torch.stack([c["a.bias"] for c in cores]).mean(0)
    )
    nothing = [{name: torch.zeros_like(t) for name, t in fisher.items()} for fisher in fishers]
    for name, value in merge(cores, nothing).items():
        torch.testing.assert_close(value, torch.stack([c[name] for c in cores]).mean(0))


def test_an_expert_without_fisher_has_no_say() -> None:
    cores, fishers = drawn(2, 2)
    fishers[1] = {name: torch.zeros_like(t) for name, t in fishers[1].items()}
    merged = merge(cores, fishers)
    assert all(torch.allclose(merged[name], cores[0][name]) for name in merged)


def test_the_fisher_of_a_parameter_is_not_shrunk() -> None:
    """The published + 1e-12 turns a parameter of near-zero Fisher to zero (D13)."""
    cores = [{"w": torch.tensor([2.0, 5.0])}, {"w": torch.tensor([2.0, 5.0])}]
    fishers = [{"w": torch.tensor([1e-30, 1e-31])}, {"w": torch.tensor([1e-29, 1e-33])}]
    assert merge(cores, fishers)["w"].tolist() == [2.0, 5.0]


def test_what_does_not_fit_together_raises() -> None:
    cores, fishers = drawn(3, 2)
    with pytest.raises(ValueError, match="at least one"):
        merge([], [])
    with pytest.raises(ValueError, match=r"2 cores, 1 Fishers"):
        merge(cores, fishers[:1])
    for broken in (
        {"a.weight": torch.zeros(3, 4)},
        {"a.weight": torch.zeros(3, 5), "a.bias": torch.zeros(3)},
    ):
        with pytest.raises(ValueError, match="equal parameter names and shapes"):
            merge([cores[0], broken], fishers)
        with pytest.raises(ValueError, match="equal parameter names and shapes"):
            merge(cores, [fishers[0], broken])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_fisher_that_is_not_finite_raises(value: float) -> None:
    cores, fishers = drawn(4, 2)
    fishers[0]["a.bias"][0] = value
    with pytest.raises(ValueError, match="finite"):
        merge(cores, fishers)


def test_freezing_leaves_no_parameter_and_keeps_the_state() -> None:
    core = ExpertCore(ExpertConfig(num_heads=2, head_dim=4), DIM, DIM).eval()
    frozen = copy.deepcopy(core)
    freeze(frozen)
    assert list(frozen.parameters()) == []
    assert list(frozen.state_dict()) == list(core.state_dict())
    assert all(
        torch.equal(a, b)
        for a, b in zip(frozen.state_dict().values(), core.state_dict().values(), strict=True)
    )
    with torch.no_grad():
        core.query.weight.add_(1.0)
    assert not torch.equal(frozen.query.weight, core.query.weight)  # a copy, not a view
    assert not frozen.query.weight.requires_grad
    frozen.load_state_dict(core.state_dict())
    assert torch.equal(frozen.query.weight, core.query.weight)


def module(num_tables: int, *, weight: float, seed: int = 0) -> MLTFR:
    """Experts, adapters, filters and tables all equal, far from their start."""
    torch.manual_seed(seed)
    config = MLTFRConfig(
        tables=tuple(f"t{m}" for m in range(num_tables)),
        filter=FilterConfig(top_k=4, shortlist_size=None, query_every=2),
        expert=ExpertConfig(num_heads=2, head_dim=4),
        consensus=ConsensusConfig(weight=weight),
    )
    made = new_mltfr(config, DIM, [torch.randn(50, 8)] * num_tables)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for group in (made.cores, made.adapters, made.selectors):
            for other in group[1:]:
                other.load_state_dict(group[0].state_dict())
    return made.eval()


def added(mltfr: MLTFR) -> Tensor:
    x = torch.randn(3 * 5, DIM, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return mltfr(x, Packing(torch.ones(3, 5, dtype=torch.int64)))[0]


def test_the_consensus_of_equal_experts_over_equal_tables_is_that_expert() -> None:
    mltfr = module(3, weight=0.5)
    alone = added(mltfr)  # the gate mixes equal experts: one expert's output
    cores = [dict(core.state_dict()) for core in mltfr.cores]
    generator = torch.Generator().manual_seed(1)
    fishers = [
        {name: torch.rand(t.shape, generator=generator) for name, t in core.items()}
        for core in cores
    ]
    mltfr.add_consensus(merge(cores, fishers))
    torch.testing.assert_close(added(mltfr), 1.5 * alone, rtol=1e-5, atol=1e-6)
    assert alone.abs().max() > 0.1


def test_adding_the_consensus_adds_no_parameter_and_weight_zero_changes_nothing() -> None:
    mltfr = module(2, weight=0.0)
    names, before = [name for name, _ in mltfr.named_parameters()], added(mltfr)
    mltfr.add_consensus({name: torch.ones_like(p) for name, p in mltfr.cores[0].named_parameters()})
    assert [name for name, _ in mltfr.named_parameters()] == names
    assert {name for name in mltfr.state_dict() if name.startswith("consensus.")} == {
        f"consensus.{linear}.{kind}"
        for linear in ("query", "key", "value", "out")
        for kind in ("weight", "bias")
    }
    torch.testing.assert_close(added(mltfr), before, rtol=0, atol=1e-7)


def test_gradients_pass_through_the_frozen_consensus_to_what_feeds_it() -> None:
    mltfr = module(2, weight=1.0)
    mltfr.add_consensus(
        {name: 0.3 * torch.randn_like(p) for name, p in mltfr.cores[0].named_parameters()}
    )
    assert mltfr.consensus is not None
    blocks = mltfr.blocks(torch.randn(2 * 4, DIM), Packing(torch.ones(2, 4, dtype=torch.int64)))
    attended = [
        selection.attended(adapter)
        for selection, adapter in zip(mltfr.selections(Queries(blocks.queries)), mltfr.adapters)
    ]
    mltfr.consensus(blocks.positions, attended).square().sum().backward()
    for m in range(2):
        assert mltfr.selectors[m].projection.weight.grad.abs().max() > 0
        assert mltfr.adapters[m].linear.weight.grad.abs().max() > 0
        assert mltfr.cores[m].query.weight.grad is None
