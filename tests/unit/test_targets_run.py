"""Several targets a user through a whole run: metrics, ranks, report, comparison."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support import tiny_config, write_periods

from mltfr_dist.cli import main
from mltfr_dist.config import RunConfig
from mltfr_dist.data.inspect.report import inspect
from mltfr_dist.data.shards.manifest import load_manifest
from mltfr_dist.distributed.ranks import ALONE
from mltfr_dist.errors import DataError
from mltfr_dist.metrics import metric_sums
from mltfr_dist.serving.scoring import score_histories
from mltfr_dist.training.comparing.compare import Options, compare_runs
from mltfr_dist.training.comparing.text import as_text
from mltfr_dist.training.evaluating.compare import baseline_result
from mltfr_dist.training.evaluating.evaluate import rank_users
from mltfr_dist.training.evaluating.rankers import ByModel, ByScores, MeanLoss
from mltfr_dist.training.running.fit import fit
from mltfr_dist.training.streams import ranking_stream
from mltfr_dist.training.using.inference import load_run

QUICK = Options(metric="Recall@10", resamples=200)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run of an epoch whose validation and test have several targets a user."""
    folder = tmp_path_factory.mktemp("periods")
    for name in ("all", "next"):
        write_periods(folder, name, targets=name)
    config = tiny_config(
        folder,
        data__path=str(folder / "all"),
        training__epochs=1,
        training__consensus_epochs=1,
        evaluation__batch_size=23,
        baselines=["popularity", "item_knn"],
    )
    fit(config)
    return config


def test_the_run_measures_and_reports_them(
    run: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest, table = load_manifest(run.data.path), pq.read_table(run.folder / "ranks.parquet")
    info, result = manifest.splits["test"], json.loads((run.folder / "result.json").read_text())
    rows = table.filter(np.array([s == "test" for s in table["split"].to_pylist()]))
    assert len(rows) == info.num_targets > info.num_sequences == len(rows["user"].unique())
    users = torch.tensor(rows["user"].combine_chunks().dictionary_encode().indices.to_pylist())
    sums = metric_sums(torch.tensor(rows["rank"].to_pylist()), (10,), users)
    assert 0 < result["test"]["Recall@10"] < result["test"]["HR@10"]
    for name, total in sums.items():
        assert result["test"][name] == pytest.approx(total / info.num_sequences, rel=1e-12)
    report = (run.folder / "report.md").read_text()
    assert "split global_temporal, all targets of a period" in report
    assert f"{info.num_sequences} test users with {info.num_targets} targets" in report
    assert "all targets of a period" in inspect(run.data.path, None)
    assert main(["evaluate", str(run.folder), "--lists"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert {k: v for k, v in printed.items() if k in result["test"]} == result["test"]


def test_a_model_places_each_target_by_its_users_scores(run: RunConfig) -> None:
    loaded = load_run(run.folder)
    model, num_items = loaded.model, loaded.inputs.manifest.num_items

    def score(batch):
        return score_histories(model, batch.item_ids)

    result = {}
    for size in (40, 1000):
        evaluation = run.evaluation.model_copy(update={"batch_size": size})
        config = run.model_copy(update={"evaluation": evaluation})
        loss = MeanLoss(ALONE)
        for name, place in (("m", ByModel(model, loss)), ("s", ByScores(score, num_items))):
            stream = ranking_stream(config, "test", ALONE)
            result[name, size] = rank_users(place, stream, evaluation, ALONE).ranks
        result["loss", size] = torch.tensor(loss.mean())
    for name in ("m", "s"):
        assert torch.equal(result[name, 40], result["m", 1000])
    assert torch.isclose(result["loss", 40], result["loss", 1000])
    assert result["m", 40].unique().numel() > 10


def test_users_are_what_is_compared(run: RunConfig) -> None:
    baselines = [run.folder / f"ranks-{name}.parquet" for name in ("popularity", "item_knn")]
    result = compare_runs([*baselines, run.folder], "test", QUICK)
    info = load_manifest(run.data.path).splits["test"]
    assert (result.num_users, result.num_targets) == (info.num_sequences, info.num_targets)
    for one in result.differences:
        assert one.wins + one.losses + one.ties == result.num_users
    # Differences of users, of a slice by its targets alone: by hand for the middle third of items.
    tables = [pq.read_table(path).to_pandas() for path in baselines]
    popular, knn = (table[table["split"] == "test"] for table in tables)
    (block,) = [s for s in result.differences[0].slices if s.name.startswith("middling target")]
    low, high = block.name.split("(")[1].rstrip(")").split("..")
    inside = popular["popularity"].between(int(low), int(high))
    values = [
        frame[inside].groupby("user")["rank"].apply(lambda ranks: (ranks <= 10).mean())
        for frame in (popular, knn)
    ]
    assert block.users == len(values[0])
    assert block.reference == pytest.approx(values[0].mean())
    assert block.change.difference == pytest.approx((values[1] - values[0]).mean())
    text = as_text(result)
    assert f"{result.num_users} users, {result.num_targets} targets" in text
    assert "all targets of a period" in text


def test_the_order_of_rows_does_not_matter(run: RunConfig, tmp_path: Path) -> None:
    table = pq.read_table(run.folder / "ranks-item_knn.parquet")
    order = np.random.default_rng(0).permutation(len(table))
    pq.write_table(table.take(order), tmp_path / "mixed.parquet")
    popular = run.folder / "ranks-popularity.parquet"
    (straight,), (mixed,) = (
        compare_runs([popular, other], "test", QUICK).differences
        for other in (run.folder / "ranks-item_knn.parquet", tmp_path / "mixed.parquet")
    )
    assert (mixed.changes, mixed.p) == (straight.changes, straight.p)
    pq.write_table(table.slice(1), tmp_path / "fewer.parquet")
    with pytest.raises(DataError, match="1 users have different targets"):
        compare_runs([popular, tmp_path / "fewer.parquet"], "valid", QUICK)


def test_next_and_all_are_not_compared(run: RunConfig, tmp_path: Path) -> None:
    changed = {"data": run.data.model_copy(update={"path": run.data.path.parent / "next"})}
    config, place = run.model_copy(update=changed), tmp_path / "next.parquet"
    manifest = load_manifest(config.data.path)
    baseline_result("popularity", config, manifest, ALONE, read_test=True, ranks_file=place)
    assert len(pq.read_table(place)) == sum(
        manifest.splits[split].num_sequences for split in ("valid", "test")
    )
    with pytest.raises(
        DataError,
        match=r"split .global_temporal, all targets of a period there, global_temporal here.",
    ):
        compare_runs([run.folder, place], "test", QUICK)
