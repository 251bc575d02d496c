"""`ranks.parquet`: the same rows at any number of ranks, in the order and the words of the data."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from support import tiny_config, write_table

from mltfr_dist.config import RunConfig
from mltfr_dist.data.batch import RankingBatch
from mltfr_dist.distributed.ranks import ALONE
from mltfr_dist.metrics import metric_sums
from mltfr_dist.schema import changed
from mltfr_dist.training.evaluating import user_ranks
from mltfr_dist.training.evaluating.compare import baseline_result, final_metrics
from mltfr_dist.training.evaluating.rankers import ByScores
from mltfr_dist.training.evaluating.user_ranks import KEY, UserRanks
from mltfr_dist.training.inputs import load_inputs


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return tiny_config(tmp_path_factory.mktemp("data"), evaluation__batch_size=7)


def by_id(batch: RankingBatch) -> torch.Tensor:
    return torch.arange(41.0).repeat(len(batch.target_ids), 1)


def test_the_rows_are_the_users_of_the_data(config: RunConfig, tmp_path: Path) -> None:
    manifest, path = load_inputs(config).manifest, tmp_path / "ranks.parquet"
    _, by_slice = final_metrics(ByScores(by_id, 40), config, manifest, ALONE, True, path)
    rows = pq.read_table(path).to_pylist()
    source = (config.data.path.parent / "interactions.txt").read_text().splitlines()
    histories = {line.split()[0]: line.split()[1:] for line in source}
    training = [item for items in histories.values() for item in items[:-2]]
    for split, place in (("valid", -2), ("test", -1)):
        here = [row for row in rows if row["split"] == split]
        assert len({row["user"] for row in here}) == len(here) == len(histories)
        for row in here:
            items = histories[row["user"]]
            assert row["target"] == items[place]
            assert row["history_length"] == len(items[:place])
            assert row["popularity"] == training.count(row["target"])
    ranks = torch.tensor([row["rank"] for row in rows if row["split"] == "test"])
    sums = metric_sums(ranks.double(), config.evaluation.cutoffs)
    means = {name: total / len(ranks) for name, total in sums.items()}
    assert means == pytest.approx(by_slice["all"], rel=1e-12)


def test_what_the_file_says_of_itself(config: RunConfig, tmp_path: Path) -> None:
    manifest = load_inputs(config).manifest
    UserRanks().write(tmp_path / "a.parquet", config, manifest, ALONE)
    UserRanks().write(tmp_path / "b.parquet", config, manifest, ALONE, baseline="popularity")
    own, baseline = (
        json.loads(pq.read_schema(tmp_path / name).metadata[KEY])
        for name in ("a.parquet", "b.parquet")
    )
    assert own["protocol"] == baseline["protocol"]
    assert own["protocol"]["ties"] == "pessimistic"
    assert own["protocol"]["candidates"] == "all 40 items"
    assert (own["seed"], baseline["seed"]) == (0, None)
    assert (own["model"], baseline["model"]) == ("sasrec + MLTFR", "popularity")
    seeds = [config.model_copy(update={"name": f"s{n}"}) for n in range(2)]
    assert len({user_ranks.model_sha256(one) for one in seeds}) == 1


def test_tables_are_known_by_their_rows_and_not_by_their_names(
    config: RunConfig, tmp_path: Path
) -> None:
    same, other = (
        write_table(tmp_path / name, "first", num_rows=90, dim=12, seed=seed)
        for name, seed in (("same", 1), ("other", 3))
    )
    second = config.mltfr.tables[1]
    hashes = [
        user_ranks.model_sha256(changed(config, {"mltfr.tables": [first, second]}, source="a test"))
        for first in (config.mltfr.tables[0], same, other)
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_baseline_writes_them_where_it_is_told(config: RunConfig, tmp_path: Path) -> None:
    manifest, path = load_inputs(config).manifest, tmp_path / "deep" / "r.parquet"
    done = baseline_result("popularity", config, manifest, ALONE, read_test=False, ranks_file=path)
    table = pq.read_table(path)
    assert table["split"].unique().to_pylist() == ["valid"]
    assert float((table["rank"].to_numpy() <= 10).mean()) == pytest.approx(done.valid["HR@10"])
    assert not list(path.parent.glob(".partial*"))
