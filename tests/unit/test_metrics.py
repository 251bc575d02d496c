"""Metrics, on tables worked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from mltfr_dist.metrics import Ties, metric_sums, target_ranks


@pytest.mark.parametrize(
    ("ties", "expected"),
    [("optimistic", [1, 2, 1]), ("mean", [1, 3, 3]), ("pessimistic", [1, 4, 5])],
)
def test_ranks_under_the_three_tie_rules(ties: Ties, expected: list[int]) -> None:
    better, equal = torch.tensor([0, 1, 0]), torch.tensor([0, 2, 4])
    assert target_ranks(better, equal, ties).tolist() == expected


def test_a_mean_rank_may_be_half_integral() -> None:
    assert target_ranks(torch.tensor([0]), torch.tensor([1]), "mean").tolist() == [1.5]


def test_a_constant_model_does_not_look_good() -> None:
    """All scores equal: only the pessimistic rule, the default, leaves nothing to gain from it."""
    assert target_ranks(torch.tensor([0]), torch.tensor([99]), "pessimistic").item() == 100


def test_the_order_of_users_changes_no_bit() -> None:
    draws = torch.Generator().manual_seed(0)
    ranks = torch.randint(1, 1000, (5000,), generator=draws).double()
    mixed = ranks[torch.randperm(5000, generator=draws)]
    assert metric_sums(ranks, (5, 10)) == metric_sums(mixed, (5, 10))
    assert metric_sums(ranks, (5,))["MRR"] == math.fsum((1 / ranks).tolist())


def test_metrics_by_hand() -> None:
    sums = metric_sums(torch.tensor([1.0, 2.0, 3.0, 7.0], dtype=torch.float64), (1, 3, 10))
    assert sums == pytest.approx(
        {
            "HR@1": 1,
            "NDCG@1": 1,
            "MAP@1": 1,
            "Recall@1": 1,
            "Precision@1": 1,
            "HR@3": 3,
            "NDCG@3": 1 + 1 / math.log2(3) + 1 / 2,
            "MAP@3": 1 + 1 / 2 + 1 / 3,
            "Recall@3": 3,
            "Precision@3": 3 / 3,
            "HR@10": 4,
            "NDCG@10": 1 + 1 / math.log2(3) + 1 / 2 + 1 / 3,
            "MAP@10": 1 + 1 / 2 + 1 / 3 + 1 / 7,
            "Recall@10": 4,
            "Precision@10": 4 / 10,
            "MRR": 1 + 1 / 2 + 1 / 3 + 1 / 7,
        }
    )


def test_a_rank_equal_to_the_cutoff_is_a_hit_and_half_a_rank_beyond_is_none() -> None:
    assert metric_sums(torch.tensor([5.0]), (5,))["HR@5"] == 1
    assert metric_sums(torch.tensor([5.5]), (5,))["HR@5"] == 0


def test_sums_add_up_over_parts() -> None:
    ranks = torch.tensor([1.0, 4.0, 9.0, 30.0, 2.0])
    whole, left, right = (metric_sums(block, (5, 10)) for block in (ranks, ranks[:2], ranks[2:]))
    assert {name: left[name] + right[name] for name in whole} == pytest.approx(whole)


def test_no_user_gives_zeros() -> None:
    assert set(metric_sums(torch.zeros(0), (10,)).values()) == {0.0}
    none = torch.zeros(0, dtype=torch.int64)
    assert target_ranks(none, none, "mean").shape == (0,)


def of_a_list(relevant: list[bool]) -> dict[str, float]:
    """Metrics at K = 10 by their definitions for any number of relevant items, in plain Python."""
    top, total = relevant[:10], sum(relevant)
    result = [sum(top[: place + 1]) / (place + 1) for place in range(len(top)) if top[place]]
    gains = [1 / math.log2(place + 2) for place in range(len(top))]
    best = sum(gains[: min(10, total)])
    return {
        "HR@10": float(any(top)),
        "Recall@10": sum(top) / total,
        "NDCG@10": sum(gain for gain, hit in zip(gains, top, strict=True) if hit) / best,
        "MAP@10": sum(result) / total,
        "Precision@10": sum(top) / 10,
        "MRR": 1 / (relevant.index(True) + 1),
    }


def test_metrics_are_those_of_the_general_definitions() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(300, 61, generator=generator, dtype=torch.float64)
    scores[:, 0] = -math.inf
    targets = torch.randint(1, 61, (300,), generator=generator)
    expected: dict[str, float] = {}
    ranks = []
    for row, target in zip(scores.tolist(), targets.tolist(), strict=True):
        order = sorted(range(1, 61), key=lambda item: -row[item])
        ranks.append(order.index(target) + 1.0)
        for name, value in of_a_list([item == target for item in order]).items():
            expected[name] = expected.get(name, 0.0) + value
    sums = metric_sums(torch.tensor(ranks, dtype=torch.float64), (10,))
    assert sums == pytest.approx(expected, rel=1e-9)
