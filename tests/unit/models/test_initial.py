"""Initial values of item tables: functions of (seed, row, column), of the right distribution."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from mltfr_dist.models import initial
from mltfr_dist.models.initial import ItemEmbedding, RowDraws

NORMAL = RowDraws(7, "normal", 0.02)


@pytest.mark.parametrize("kind", ["normal", "uniform"])
@pytest.mark.parametrize("dim", [1, 5, 64])
def test_any_rows_in_any_order_and_chunk_are_those_of_the_whole(
    kind: str, dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    draws = NORMAL._replace(kind=kind)
    whole = torch.empty(1000, dim)
    draws.fill(whole)
    mixed = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    for ids in (mixed, mixed[:1], torch.arange(3, 1000, 4)):
        assert torch.equal(draws.rows(ids, dim), whole[ids])
    monkeypatch.setattr(initial, "CHUNK_ELEMENTS", 100)
    again = torch.empty(1000, dim)
    draws.fill(again)
    assert torch.equal(again, whole)
    assert torch.equal(whole[0], torch.zeros(dim))


def test_values_are_normal_and_independent() -> None:
    values = NORMAL.rows(torch.arange(1, 20_001), 50).double() / 0.02
    assert stats.kstest(values.flatten().numpy(), "norm").pvalue > 0.01
    assert values.abs().max() < 4.5
    assert values.std().item() == pytest.approx(1, abs=3e-3)
    correlations = torch.corrcoef(values.T) - torch.eye(50)
    assert correlations.abs().max() < 6 / math.sqrt(20_000)
    other = NORMAL._replace(seed=8).rows(torch.arange(1, 20_001), 50).double() / 0.02
    assert (values * other).mean().abs() < 6 / 1000
    neighbours = (values[1:] * values[:-1]).mean().abs()
    assert neighbours < 6 / 1000


def test_uniform_values_fill_their_range() -> None:
    values = RowDraws(0, "uniform", 0.5).rows(torch.arange(1, 20_001), 5)
    assert stats.kstest(values.flatten().numpy(), "uniform", args=(-0.5, 1)).pvalue > 0.01


def test_rows_beyond_the_millions_differ_from_each_other() -> None:
    ids = torch.tensor([1, 2, 1 << 20, 1 << 31, 1 << 32, (1 << 32) + 1, 10**9])
    assert len(NORMAL.rows(ids, 8).unique(dim=0)) == len(ids)


def test_an_embedding_follows_torchs_seed_and_more_items_change_no_row() -> None:
    torch.manual_seed(3)
    small, after = ItemEmbedding(10, 4), torch.rand(3)
    torch.manual_seed(3)
    large, after_large = ItemEmbedding(1000, 4), torch.rand(3)
    assert torch.equal(large.weight[:10], small.weight)
    assert torch.equal(after, after_large)
    assert torch.equal(large.draws.rows(torch.tensor([999]), 4), large.weight[999:])
    torch.manual_seed(4)
    assert not torch.equal(ItemEmbedding(10, 4).weight, small.weight)


def test_a_model_without_numbers_leaves_later_ones_as_they_are() -> None:
    torch.manual_seed(0)
    with torch.device("meta"):
        assert ItemEmbedding(6, 4).weight.is_meta
    torch.manual_seed(0)
    first = ItemEmbedding(6, 4).weight
    assert torch.equal(first, ItemEmbedding(6, 4).weight) is False
    torch.manual_seed(0)
    assert torch.equal(first, ItemEmbedding(6, 4).weight)
