"""Baselines against dense computations."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from support import clean_environment

from mltfr_dist.config import PrepareConfig
from mltfr_dist.data.batch import RankingBatch
from mltfr_dist.data.prepare.run import prepare
from mltfr_dist.data.shards.packed import PackedSequences
from mltfr_dist.data.shards.short_parts import training_sequences
from mltfr_dist.errors import ConfigError
from mltfr_dist.training.evaluating import baselines
from mltfr_dist.training.evaluating.baselines import item_knn, popularity

NUM_ITEMS = 9
SEQUENCES = st.lists(
    st.lists(st.integers(1, NUM_ITEMS), min_size=1, max_size=8), min_size=1, max_size=12
)


def packed(sequences: list[list[int]]) -> PackedSequences:
    offsets = np.cumsum([0, *map(len, sequences)]).astype(np.int64)
    return PackedSequences(
        np.concatenate([np.array(s, dtype=np.uint8) for s in sequences]),
        offsets,
        np.arange(len(sequences)),
    )


def batch(histories: list[list[int]], width: int = 3) -> RankingBatch:
    """Histories of which only the last ``width`` items are shown, while all are seen."""
    shown = [h[-width:] + [0] * (width - len(h[-width:])) for h in histories]
    rows = torch.tensor([row for row, h in enumerate(histories) for _ in h])
    return RankingBatch(
        torch.tensor(shown),
        torch.ones(len(histories)).long(),
        rows,
        torch.tensor([i for h in histories for i in h]),
    )


def dense_knn(
    sequences: list[list[int]], history: list[int], neighbours: int, shrinkage: float
) -> list[float]:
    users = {
        item: {u for u, s in enumerate(sequences) if item in s} for item in range(1, NUM_ITEMS + 1)
    }
    scores = [0.0] * (NUM_ITEMS + 1)
    for item in history:
        similar = {}
        for other in range(1, NUM_ITEMS + 1):
            common = len(users[item] & users[other])
            if other != item and common:
                similar[other] = common / (
                    math.sqrt(len(users[item]) * len(users[other])) + shrinkage
                )
        for other in sorted(similar, key=lambda o: (-similar[o], o))[:neighbours]:
            scores[other] += similar[other]
    return scores


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    SEQUENCES,
    st.lists(
        st.lists(st.integers(1, NUM_ITEMS), min_size=1, max_size=5, unique=True),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([0.0, 10.0]),
)
def test_item_knn_equals_a_dense_computation(
    sequences: list[list[int]], histories: list[list[int]], shrinkage: float
) -> None:
    scores = item_knn(packed(sequences), NUM_ITEMS, shrinkage=shrinkage)(batch(histories))
    assert scores.shape == (len(histories), NUM_ITEMS + 1)
    assert torch.isneginf(scores[:, 0]).all()
    for row, history in zip(scores, histories, strict=True):
        expected = dense_knn(sequences, history, 100, shrinkage)
        torch.testing.assert_close(row[1:], torch.tensor(expected[1:]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("neighbours", [1, 2])
def test_item_knn_keeps_the_nearest(neighbours: int) -> None:
    sequences = [[1, 2], [1, 2], [1, 2, 3], [1, 3], [1, 4], [4, 5, 6, 7], [2, 2, 8]]
    scores = item_knn(packed(sequences), NUM_ITEMS, num_neighbours=neighbours, shrinkage=1.0)(
        batch([[1], [4], [9]])
    )
    for row, history in zip(scores, [[1], [4], [9]], strict=True):
        torch.testing.assert_close(
            row[1:], torch.tensor(dense_knn(sequences, history, neighbours, 1.0)[1:])
        )
    assert int((scores[0] > 0).sum()) == neighbours
    assert (
        scores[2, 1:].tolist() == [0.0] * NUM_ITEMS
    )  # an item of no training user has no neighbour


def test_popularity_counts_interactions_and_is_equal_for_all() -> None:
    score = popularity(packed([[1, 1, 3], [3, 3, 2], [3]]), 5)
    scores = score(batch([[1], [4, 5]]))
    assert scores[0].tolist() == [-math.inf, 2, 1, 4, 0, 0]
    assert torch.equal(scores[0], scores[1])
    scores.fill_(7)  # a caller's change does not reach the next batch
    assert score(batch([[1]]))[0, 3] == 4


def test_training_sequences_are_the_training_split_and_no_more(tmp_path: Path) -> None:
    (tmp_path / "raw.txt").write_text("".join(f"u{u} a b c{u % 3} d e\n" for u in range(9)))
    config = PrepareConfig(
        format="sequences", user_core=1, item_core=1, sequences_per_shard=4, sequences_per_block=2
    )
    manifest = prepare(str(tmp_path / "raw.txt"), tmp_path / "data", config, log=lambda _: None)
    train = training_sequences(tmp_path / "data", manifest)
    assert len(manifest.splits["train"].shards) == 3
    assert len(train) == 9
    assert (
        np.diff(train.offsets).tolist() == [3] * 9
    )  # the last two items of each are validation and test


def all_at_once(
    train: PackedSequences, num_items: int, num_neighbours: int, shrinkage: float
) -> sparse.csr_matrix:
    """Similarities by one product of all items with all: what the blocks must repeat to the
    digit.
    """
    rows = np.repeat(np.arange(len(train)), train.lengths)
    seen = sparse.csr_matrix(
        (np.ones(len(rows), np.float32), (rows, train.items)), shape=(len(train), num_items + 1)
    )
    seen.data[:] = 1.0
    together = (seen.T @ seen).tocoo()
    norms = np.sqrt(np.asarray(seen.sum(0)).ravel())
    similarity = together.data / (norms[together.row] * norms[together.col] + shrinkage)
    similarity[together.row == together.col] = 0
    order = np.lexsort((together.col, -similarity, together.row))
    by_row = together.row[order]
    place = np.arange(len(by_row)) - np.searchsorted(by_row, by_row)
    nearest = order[place < num_neighbours]
    return sparse.csr_matrix(
        (similarity[nearest], (together.row[nearest], together.col[nearest])),
        shape=(num_items + 1, num_items + 1),
    )


@pytest.mark.parametrize("pairs", [1, 5000, 10**9])
def test_blocks_of_items_give_the_same_digits(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Users and items as many, and as unequal, as MovieLens-100K's."""
    random, num_items = np.random.default_rng(0), 400 if pairs == 1 else 1682
    lengths = np.clip(random.pareto(1.2, 943) * 30, 2, 700).astype(int)
    train = packed_wide([1 + (num_items * random.random(n) ** 2).astype(int) for n in lengths])
    monkeypatch.setattr(baselines, "_PAIRS_AT_ONCE", pairs)
    score = item_knn(train, num_items)
    histories = [sorted(set(train[user].tolist())) for user in range(0, 943, 40)]
    neighbours = all_at_once(train, num_items, 100, 10.0)
    seen = np.zeros((len(histories), num_items + 1), np.float32)
    for row, history in enumerate(histories):
        seen[row, history] = 1
    expected = (sparse.csr_matrix(seen) @ neighbours).toarray()
    assert np.array_equal(score(batch(histories)).numpy()[:, 1:], expected[:, 1:])


def test_item_knn_says_why_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three items meet three others each at most; two neighbours of each are kept."""
    train = packed([[1, 2, 3], [1, 2, 3]])
    needed = 2 * 16 * 3 * 2
    for free, refused in ((needed, False), (needed - 1, True)):
        memory = psutil.virtual_memory()._replace(available=free)
        monkeypatch.setattr(psutil, "virtual_memory", lambda memory=memory: memory)
        if refused:
            with pytest.raises(ConfigError, match="for 6 neighbours of 3 items"):
                item_knn(train, 3, num_neighbours=2)
        else:
            item_knn(train, 3, num_neighbours=2)


def packed_wide(sequences: list[np.ndarray]) -> PackedSequences:
    offsets = np.cumsum([0, *map(len, sequences)]).astype(np.int64)
    return PackedSequences(np.concatenate(sequences), offsets, np.arange(len(sequences)))


MEMORY = """
import resource, numpy as np
from mltfr_dist.data.shards.packed import PackedSequences
from mltfr_dist.training.evaluating import baselines
from mltfr_dist.training.evaluating.baselines import item_knn
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
n = 5000
train = PackedSequences(np.arange(1, n + 1), np.array([0, n]), np.zeros(1, np.int64))
before = peak()
item_knn(train, n)
print(peak() - before)
"""


def test_one_user_of_many_items_takes_little_memory() -> None:
    """25 million pairs of items; all at once they took over a gigabyte."""
    command = [sys.executable, "-c", MEMORY]
    done = subprocess.run(
        command, env=clean_environment(), capture_output=True, text=True, timeout=200, check=True
    )
    assert int(done.stdout) < 200_000  # kB
