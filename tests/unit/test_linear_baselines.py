"""Baselines in closed form and by counting, against independent statements of what they minimise or
count.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import optimize
from support import tiny_config
from torch.nn.utils.rnn import pad_sequence

from mltfr_dist.baselines import BASELINES
from mltfr_dist.data.batch import RankingBatch
from mltfr_dist.data.shards.packed import PackedSequences
from mltfr_dist.distributed.ranks import ALONE
from mltfr_dist.errors import ConfigError
from mltfr_dist.training.evaluating import linear_baselines
from mltfr_dist.training.evaluating.baselines import markov_chain, recent_popularity
from mltfr_dist.training.evaluating.compare import baseline_result
from mltfr_dist.training.evaluating.linear_baselines import ease, ials, interactions, solved
from mltfr_dist.training.inputs import load_inputs

ITEMS = 12


def sequences(number: int = 40, seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(1, ITEMS + 1, random.integers(2, 9)).tolist() for _ in range(number)]


def packed(lists: list[list[int]]) -> PackedSequences:
    offsets = np.cumsum([0, *map(len, lists)]).astype(np.int64)
    return PackedSequences(np.concatenate(lists).astype(np.int64), offsets, np.arange(len(lists)))


def batch(lists: list[list[int]]) -> RankingBatch:
    rows = [row for row, items in enumerate(lists) for _ in items]
    return RankingBatch(
        pad_sequence([torch.tensor(items) for items in lists], batch_first=True),
        torch.ones(len(lists), dtype=torch.int64),
        torch.tensor(rows),
        torch.tensor([item for items in lists for item in items]),
    )


def test_ease_is_a_ridge_regression_of_each_item_by_the_others() -> None:
    train = packed(sequences())
    seen, ridge = interactions(train, ITEMS).toarray()[:, 1:], 3.0
    weights = np.zeros((ITEMS, ITEMS))
    for item in range(ITEMS):
        others = [other for other in range(ITEMS) if other != item]
        x, y = seen[:, others], seen[:, item]
        weights[others, item] = np.linalg.solve(x.T @ x + ridge * np.eye(ITEMS - 1), x.T @ y)
    asked = [[1, 5, 5], [2]]
    expected = np.array([weights[[0, 4]].sum(0), weights[1]])
    result = ease(train, ITEMS, ridge=ridge)(batch(asked))
    assert result[:, 1:].numpy() == pytest.approx(expected, abs=1e-6)
    assert result[:, 0].tolist() == [-torch.inf] * 2


def test_ease_says_why_it_does_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"10,000,000 x 10,000,000 numbers, 2235174\.2 GiB"):
        ease(packed([[1, 2]]), 10_000_000)


def test_a_users_factors_minimise_the_weighted_squared_error() -> None:
    random = np.random.default_rng(3)
    others, alpha, ridge = random.normal(size=(ITEMS + 1, 3)), 4.0, 0.7
    seen = interactions(packed([[2, 7, 7, 9], [4]]), ITEMS)
    result = solved(seen, others, alpha, ridge)
    for row, target in enumerate(seen.toarray()):

        def loss(vector: np.ndarray, target: np.ndarray = target) -> float:
            errors = (target - others @ vector) ** 2
            return float((1 + alpha * target) @ errors + ridge * vector @ vector)

        best = optimize.minimize(loss, np.zeros(3), tol=1e-12)
        assert result[row] == pytest.approx(best.x, abs=1e-5)


@pytest.mark.parametrize("at_once", [1, 512])
def test_ials_finds_two_groups_of_items(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_baselines, "_SOLVED_AT_ONCE", at_once)
    random = np.random.default_rng(0)
    lists = [(random.permutation(6)[:4] + (1 if user % 2 else 7)).tolist() for user in range(30)]
    scores = ials(packed(lists), ITEMS, factors=2)(batch([[1, 2], [8, 9]]))
    assert scores[0, 3:7].min() > scores[0, 7:].max()
    assert scores[1, 10:].min() > scores[1, 1:7].max()


def test_the_markov_chain_counts_what_follows_the_last_item() -> None:
    train = packed([[1, 2, 3], [1, 2, 4], [1, 3], [3], [5, 1]])
    scores = markov_chain(train, ITEMS)(batch([[4, 4, 1], [3]]))
    # 2 follows 1 twice, 3 once; nothing follows the end of a sequence; then 1, 3, 2 by popularity.
    assert scores[0].argsort(descending=True)[:3].tolist() == [2, 3, 1]
    assert scores[0, 2].item() == pytest.approx(2 + 2 / 12)
    assert scores[1].argsort(descending=True)[:2].tolist() == [1, 3]
    assert scores[1].max() < 1


def test_recent_popularity_counts_the_ends_of_sequences() -> None:
    train = packed([[9, 9, 9, 1, 2, 3, 4, 5], [5, 6]])
    scores = recent_popularity(train, ITEMS)(batch([[1]]))
    assert scores[0, 1:].tolist() == [1, 1, 1, 1, 2, 1, 0, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_is_ranked_as_a_model_is(name: str, tmp_path: Path) -> None:
    """The small data is a walk from item to item: what looks at histories must find it."""
    config = tiny_config(tmp_path, baselines=[name])
    manifest = load_inputs(config).manifest
    result = baseline_result(name, config, manifest, ALONE, read_test=True)
    again = baseline_result(name, config, manifest, ALONE, read_test=True)
    assert (result.name, result.test) == (name, again.test)
    walks = {"markov_chain": 0.4, "item_knn": 0.3, "ease": 0.25, "ials": 0.2}
    assert result.test["NDCG@10"] > walks.get(name, 0.05)
    assert result.seconds > 0
