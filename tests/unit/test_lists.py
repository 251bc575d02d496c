"""What is recommended, measured: by hand, and the same lists as `recommend` gives."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from support import tiny_config

from mltfr_dist.baselines import BASELINES
from mltfr_dist.cli import main
from mltfr_dist.config import RunConfig
from mltfr_dist.distributed.ranks import ALONE
from mltfr_dist.errors import ConfigError
from mltfr_dist.list_metrics import LIST_METRICS, Lists, list_metrics
from mltfr_dist.training.evaluating.compare import baseline_result, fitted
from mltfr_dist.training.evaluating.lists import (
    lister,
    lister_by_scores,
    recommended,
    title_words,
    training_users,
)
from mltfr_dist.training.running.fit import fit
from mltfr_dist.training.streams import ranking_stream
from mltfr_dist.training.using.baseline import evaluate_baseline
from mltfr_dist.training.using.inference import evaluate_run, load_run

# Three users, items 1..5 and lists of three; the last user has one candidate left.
TITLES = [None, "Red car", "red  CAR", "blue boat", None, "red boat"]
LISTS = Lists(
    items=np.array([[1, 2, 3], [2, 4, 5], [3, 0, 0]], dtype=np.int32),
    in_histories=np.array([4.0, 2.0, 3.0]),
    interactions=np.array([0, 8, 4, 2, 0, 1]),
    users=np.array([0, 4, 2, 1, 0, 1]),
    num_users=8,
    words=title_words(TITLES),
)


def test_every_metric_by_hand() -> None:
    result = list_metrics(LISTS, (2, 3))
    assert result["Coverage@2"] == pytest.approx(4 / 5)
    assert result["Coverage@3"] == 1
    # -log2 of 4/8, 2/8, 1/8, (nobody: as one) 1/8, 1/8
    assert result["Novelty@2"] == pytest.approx(((1 + 2) / 2 + (2 + 3) / 2 + 3) / 3)
    assert result["Novelty@3"] == pytest.approx(((1 + 2 + 3) / 3 + (2 + 3 + 3) / 3 + 3) / 3)
    assert result["ARP@2"] == pytest.approx((6 + 2 + 2) / 3)
    assert result["PopularityLift@2"] == pytest.approx((6 + 2 + 2) / 3 / 3 - 1)
    # red stands in 3 of 5 titles, car, boat in 2, blue in 1.
    red, two, one = math.log(5 / 3), math.log(5 / 2), math.log(5)
    assert result["ILD@2"] == pytest.approx(0, abs=1e-12)  # of user 0 alone; user 1 has one title
    cosine = red * red / (red**2 + two**2)  # "red car", "red boat"
    assert list_metrics(LISTS._replace(items=np.array([[1, 5]])), (2,))["ILD@2"] == pytest.approx(
        1 - cosine
    )
    # User 0: "blue boat" shares no word with two equal titles; user 1: "red CAR", "red boat".
    assert result["ILD@3"] == pytest.approx(((0 + 1 + 1) / 3 + 1 - cosine) / 2)
    assert LISTS.words[3].toarray().max() == pytest.approx(one / math.hypot(one, two))


def test_blocks_of_users_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list_metrics(LISTS, (3,))
    monkeypatch.setattr("mltfr_dist.list_metrics.USERS_AT_ONCE", 1)
    assert list_metrics(LISTS, (3,)) == whole


def test_without_titles_there_is_no_diversity() -> None:
    result = list_metrics(LISTS._replace(words=None), (3,))
    assert set(result) == {f"{name}@3" for name, m in LIST_METRICS.items() if not m.reads_titles}


def test_nobody_is_recommended_anything() -> None:
    none = LISTS._replace(items=np.zeros((3, 3), dtype=np.int32))
    assert list_metrics(none, (3,)) == dict.fromkeys(list_metrics(none, (3,)), 0.0) | {
        "PopularityLift@3": -1.0
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    folder = tmp_path_factory.mktemp("lists")
    config = tiny_config(folder, training__epochs=1, training__consensus_epochs=1)
    fit(config)
    return config


def test_training_is_counted_by_users(run: RunConfig) -> None:
    manifest = load_run(run.folder).inputs.manifest
    interactions, users, num_users = training_users(run, manifest)
    source = (run.data.path.parent / "interactions.txt").read_text().splitlines()
    ids = load_run(run.folder).item_ids
    training = [line.split()[1:-2] for line in source]
    assert num_users == len(training)
    for number, raw in enumerate(ids[1:], 1):
        assert interactions[number] == sum(row.count(raw) for row in training)
        assert users[number] == sum(raw in row for row in training)
    assert (users < interactions).any(), "some user has an item twice"


@pytest.mark.parametrize("filter_seen", [True, False])
def test_lists_are_those_of_recommend(run: RunConfig, filter_seen: bool) -> None:
    loaded = load_run(run.folder)
    manifest, result = loaded.inputs.manifest, []
    for size in (7, 120):
        evaluation = run.evaluation.model_copy(update={"batch_size": size})
        config = run.model_copy(update={"evaluation": evaluation})
        best = lister(loaded.model, manifest.num_items, 38, filter_seen=filter_seen)
        stream = ranking_stream(config, "test", ALONE)
        result.append(recommended(best, stream, config, manifest, ALONE, loaded.items.titles))
    assert (result[0].items == result[1].items).all()
    source = (run.data.path.parent / "interactions.txt").read_text().splitlines()
    histories = {line.split()[0]: line.split()[1:-1] for line in source}
    for (_, history), row in zip(sorted_users(run, histories), result[0].items, strict=True):
        expected = [x.item_id for x in loaded.recommend(history, k=38, filter_seen=filter_seen)]
        assert [loaded.item_ids[i] for i in row if i] == expected
    fewest = int((result[0].items > 0).sum(1).min())
    assert fewest < 38 if filter_seen else fewest == 38


def sorted_users(run: RunConfig, histories: dict[str, list[str]]) -> list[tuple[str, list[str]]]:
    """Users in the order of the prepared data."""
    import pyarrow.parquet as pq

    users = pq.read_table(run.data.path / "users.parquet").sort_by("user_index")
    return [(user, histories[user]) for user in users["user_id"].to_pylist()]


def test_the_command_and_the_library_agree(
    run: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(run.folder), "--split", "valid", "--lists"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == load_run(run.folder).evaluate("valid", lists=True)
    plain = evaluate_run(run.folder, "valid")
    assert {name: printed[name] for name in plain} == plain
    assert set(printed) - set(plain) == {
        f"{name}@{k}" for name in LIST_METRICS for k in run.evaluation.cutoffs
    }
    assert 0 < printed["Coverage@5"] <= printed["Coverage@20"] <= 1
    assert 0 < printed["ILD@10"] < 1


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_is_measured_as_the_run_did_and_lists_its_best(
    run: RunConfig, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mltfr_dist.training.evaluating.lists.HELD_SCORES", 41 * 7)
    kept = set(run.folder.rglob("*"))
    assert main(["evaluate", str(run.folder), "--baseline", name, "--lists"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(run.folder.rglob("*")) == kept
    manifest = load_run(run.folder).inputs.manifest
    result = baseline_result(name, run, manifest, ALONE, read_test=True)
    assert {metric: printed[metric] for metric in result.test} == result.test
    assert 0 < printed["Coverage@10"] <= 1
    score = fitted(name, run, manifest, ALONE)
    best = lister_by_scores(score, manifest.num_items, 38, filter_seen=True)
    for batch in ranking_stream(run, "test", ALONE, once_a_user=True):
        scores = score(batch).numpy()
        scores[batch.seen_rows, batch.seen_items] = -np.inf
        for row, items in zip(scores, best(batch).tolist(), strict=True):
            order = sorted(range(1, len(row)), key=lambda item: -row[item])[:38]  # stable
            assert items == [item if row[item] > -np.inf else 0 for item in order]


def test_ranks_of_a_baseline_are_not_saved_as_the_models(
    run: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    typed = ["evaluate", str(run.folder), "--baseline", "popularity", "--save-ranks"]
    assert main(typed) == 2
    assert "--save-ranks writes the ranks of the run's model" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"no split `train`.*Give valid or test"):
        evaluate_baseline(run.folder, "popularity", "train")
