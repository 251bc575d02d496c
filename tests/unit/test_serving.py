"""A trained model in use: histories in every form, candidates, and scores that are the run's."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import torch
from support import tiny_config

import mltfr_dist
from mltfr_dist.distributed.meeting import stop_ranks
from mltfr_dist.errors import CheckpointError, ConfigError, DataError
from mltfr_dist.models.folded import folded
from mltfr_dist.models.tiles import Pairs
from mltfr_dist.ranking import Ranker
from mltfr_dist.serving.scoring import best_items, padded, score_histories
from mltfr_dist.training.running.fit import fit

HISTORIES = [["i1", "i2", "i3"], ["i9"], [f"i{n}" for n in range(15)], ["i7", "i8"]]
LIST = pa.list_(pa.string())


@pytest.fixture(scope="module")
def rec(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranker]:
    folder = tmp_path_factory.mktemp("serving")
    config = tiny_config(folder, training__epochs=1, training__consensus_epochs=1)
    fit(config)
    yield mltfr_dist.load(config.folder)
    stop_ranks()


FORMS: dict[str, Any] = {
    "tuples": tuple(map(tuple, HISTORIES)),
    "NumPy": np.array([np.array(row) for row in HISTORIES], dtype=object),
    "pandas column": pd.Series(HISTORIES),
    "pandas table": pd.DataFrame({"history": HISTORIES}),
    "polars column": pl.Series(HISTORIES),
    "polars table": pl.DataFrame({"history": HISTORIES}),
    "Arrow column": pa.array(HISTORIES, LIST),
    "Arrow chunks": pa.chunked_array([HISTORIES[:1], HISTORIES[1:]], LIST),
    "Arrow table": pa.table({"history": pa.array(HISTORIES, LIST)}),
}


@pytest.mark.parametrize("form", FORMS)
def test_histories_in_every_form(rec: Ranker, form: str) -> None:
    expected = rec.recommend(HISTORIES, k=4)
    assert len(expected) == len(HISTORIES)
    result = rec.recommend(FORMS[form], k=4)
    assert list(result) == list(expected)
    assert np.array_equal(rec.user_vectors(FORMS[form]), rec.user_vectors(HISTORIES))


def test_a_single_history_gives_its_items(rec: Ranker) -> None:
    for history in HISTORIES:
        single = rec.recommend(history, k=4)
        assert single == rec.recommend([history], k=4)[0]
        assert not {result.item_id for result in single} & set(history)
    block = np.array([["i1", "i2"], ["i3", "i4"]])
    assert rec.recommend(block, k=3).item_ids == rec.recommend(block.tolist(), k=3).item_ids


def test_results_in_every_form(rec: Ranker) -> None:
    users = ["anna", "ben", "cleo", "dan"]
    frame = pl.DataFrame({"user_id": users, "history": HISTORIES})
    result = rec.recommend(frame, k=3)
    table = result.to_arrow()
    assert table.column_names == ["user_id", "rank", "item_id", "score", "title"]
    assert table["user_id"].to_pylist() == [user for user in users for _ in range(3)]
    assert table["rank"].to_pylist() == [1, 2, 3] * 4
    assert result.to_pandas()["item_id"].tolist() == [raw for row in result.item_ids for raw in row]
    assert result.to_polars()["score"].to_list() == table["score"].to_pylist()
    ids, scores = result.to_numpy()
    assert ids.tolist() == result.item_ids
    assert scores.shape == (4, 3)
    assert result[1:][0] == result[1]


def test_folding_changes_no_bit(rec: Ranker) -> None:
    item_ids = padded([rec.items.encode(row) for row in HISTORIES], rec.max_len)
    assert rec.serving is not rec.model
    assert rec.serving is rec.serving
    assert folded(rec.serving) is rec.serving, "nothing is left to fold"
    assert not any("linear" in name for name in rec.serving.state_dict() if "adapters" in name)
    assert torch.equal(score_histories(rec.serving, item_ids), score_histories(rec.model, item_ids))


def test_a_score_is_the_product_of_two_vectors(rec: Ranker) -> None:
    vectors, users = rec.item_vectors(), rec.user_vectors(HISTORIES)
    scores = rec.scores(HISTORIES).numpy()
    assert vectors.shape == (41, 16)
    assert np.allclose(users @ vectors.T[:, 1:], scores[:, 1:], atol=1e-6)
    assert np.isneginf(scores[:, 0]).all()
    assert np.allclose(rec.user_vector(HISTORIES[1]), users[1], atol=1e-6)
    columns = [rec.item_ids.index(raw) for raw in ("i5", "i6")]
    assert np.array_equal(rec.score(HISTORIES, ["i5", "i6"]), scores[:, columns])


def test_candidates(rec: Ranker) -> None:
    plain = rec.recommend(HISTORIES, k=5)
    best = [row[0].item_id for row in plain]
    without = rec.recommend(HISTORIES, k=4, exclude=best)
    for row, kept in zip(without.item_ids, plain.item_ids, strict=True):
        assert not set(row) & set(best)
        assert [raw for raw in kept if raw not in best] == row[: 5 - len(set(kept) & set(best))]
    each = rec.recommend(HISTORIES, k=4, exclude=[[raw] for raw in best])
    assert each.item_ids == [row[1:] for row in plain.item_ids]
    allowed = ["i20", "i21", "i1"]
    few = rec.recommend(HISTORIES, k=3, allow=allowed)
    assert [sorted(row) for row in few.item_ids] == [["i20", "i21"], sorted(allowed)] * 1 + [
        ["i20", "i21"],
        sorted(allowed),
    ]
    assert all(
        len(row) == 3 for row in rec.recommend(HISTORIES, 3, allow=allowed, filter_seen=False)
    )
    with pytest.raises(DataError, match=r"k is 4; .* of which `allow` leaves 3"):
        rec.recommend(HISTORIES, k=4, allow=allowed)
    with pytest.raises(DataError, match="exclude holds 2 lists for 4 histories"):
        rec.recommend(HISTORIES, exclude=[["i1"], ["i2"]])


def test_unknown_ids_are_refused_or_counted(rec: Ranker) -> None:
    strange = [["i1", "x1"], ["i9"], ["x2", "x3", "i2"]]
    with pytest.raises(DataError, match=r"Unknown item id x1 in history 0 of 3.*unknown=drop"):
        rec.recommend(strange)
    result = rec.recommend(strange, unknown="drop")
    assert result.dropped == 3
    assert list(result) == list(rec.recommend([["i1"], ["i9"], ["i2"]]))
    told = rec.encode(strange, unknown="drop")
    assert told.dropped == 3
    assert np.array_equal(rec.user_vectors(told), rec.user_vectors([["i1"], ["i9"], ["i2"]]))
    with pytest.raises(ConfigError, match=r"unknown is 'ignore'.*refuse or drop"):
        rec.recommend(strange, unknown="ignore")  # type: ignore[call-overload]


def test_what_is_gone_through_once_is_kept(rec: Ranker) -> None:
    expected = list(rec.recommend(HISTORIES, 3, exclude=["i3"]))
    once, without = (history for history in HISTORIES), iter(["i3"])
    assert list(rec.recommend(once, np.int64(3), exclude=without)) == expected
    one = rec.recommend(HISTORIES[0], 3)
    assert rec.recommend(iter(HISTORIES[0]), 3) == one
    assert torch.equal(rec.scores(iter(HISTORIES)), rec.scores(HISTORIES))


def test_empty_histories(rec: Ranker) -> None:
    given = [["i1"], [], ["x1"]]
    with pytest.raises(DataError, match=r"History 1 of 3 is empty, as are 1 more.*empty=popular"):
        rec.recommend(given, unknown="drop")
    result = rec.recommend(given, k=5, unknown="drop", empty="popular", exclude=["i3"])
    counts = {
        raw: int(n) for raw, n in zip(rec.item_ids, rec.items.counts) if raw not in ("", "i3")
    }
    expected = sorted(counts, key=lambda raw: (-counts[raw], rec.item_ids.index(raw)))[:5]
    assert result.item_ids[1:] == [expected, expected]
    assert [r.score for r in result[1]] == [counts[raw] for raw in expected]
    assert result[0] == rec.recommend(["i1"], k=5, exclude=["i3"])
    with pytest.raises(DataError, match=r"History 1 of 2 is empty\.") as caught:
        rec.scores(given[:2])
    assert "popular" not in str(caught.value), "scores has no such option"


def test_of_equal_scores_the_lower_item_comes_first() -> None:
    hidden = torch.eye(2)
    vectors = torch.tensor([[1, 2], [3, 9], [3, 0], [3, 0], [1, 0]], dtype=torch.float32)
    nothing = torch.empty(0, dtype=torch.int64)
    none, second = Pairs(nothing, nothing), Pairs(torch.tensor([1]), torch.tensor([2]))
    for allowed in (None, torch.arange(1, 6)):
        values, ids = best_items(hidden, vectors, 2, second, allowed)
        assert ids.tolist() == [[2, 3], [1, 3]]
        assert values.tolist() == [[3, 3], [2, 0]]
        assert best_items(hidden, vectors, 5, none, allowed)[1][0].tolist() == [2, 3, 4, 1, 5]
    values, ids = best_items(hidden, vectors, 3, second, torch.tensor([2, 5]))
    assert ids.tolist() == [[2, 5, 0], [5, 0, 0]]
    assert values.tolist() == [[3, 1, -torch.inf], [0, -torch.inf, -torch.inf]]


def test_threads_get_what_one_caller_gets(rec: Ranker) -> None:
    requests = [HISTORIES[n % 4] for n in range(40)]
    expected = [rec.recommend(history, k=5) for history in requests]
    fresh = mltfr_dist.load(rec.config.folder)  # type: ignore[attr-defined]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda history: fresh.recommend(history, k=5), requests)) == expected


def test_an_explanation_names_what_is_kept(rec: Ranker) -> None:
    views = rec.explain(["i1", "i2"])
    assert [view.table for view in views] == ["first", "second"]
    assert sum(view.gate_weight for view in views) == pytest.approx(1, abs=1e-5)
    for view in views:
        assert len(view.tokens) == 4
        assert sum(weight for _, weight in view.tokens) == pytest.approx(1, abs=1e-5)
        assert all(token.startswith(f" {view.table}-") for token, _ in view.tokens)


BAD = {
    "one history": (lambda r: r.scores(["i1", "i2"]), r"is one history.*Put it into a list"),
    "another column": (
        lambda r: r.recommend(pl.DataFrame({"items": HISTORIES})),
        "has the columns items.*a column `history`",
    ),
    "no histories": (lambda r: r.scores([]), "no histories"),
    "empty": (lambda r: r.recommend([]), "The history is empty"),
    "a mapping": (lambda r: r.recommend({"i1": 3, "i2": 1}), "is no list of ids"),
    "a set": (lambda r: r.recommend({"i1", "i2"}), "is a set.*an order"),
    "a text as items": (lambda r: r.score([["i1"]], "i1"), "'i1' is no list of ids"),
    "no items": (lambda r: r.score([["i1"]], []), "The list of items is empty"),
    "a vector of a text": (lambda r: r.user_vector("i1"), "'i1' is no list of ids"),
    "a vector of nothing": (lambda r: r.user_vector([]), r"is empty. Give at least one item id\.$"),
    "k of a text": (lambda r: r.recommend(["i1"], k="3"), r"k is '3'; .* k is a whole number"),
    "k of a share": (lambda r: r.recommend(["i1"], k=0.5), r"k is 0.5; .* k is a whole number"),
    "k of no item": (lambda r: r.recommend(["i1"], k=np.int64(0)), r"k is a whole number in 1"),
    "sets": (lambda r: r.scores([["i1"], {"i2"}]), "History 1 is a set"),
}


@pytest.mark.parametrize("wrong", BAD)
def test_bad_use(rec: Ranker, wrong: str) -> None:
    use, words = BAD[wrong]
    with pytest.raises(DataError, match=words):
        use(rec)


def test_a_bare_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no run"):
        mltfr_dist.load(tmp_path)
