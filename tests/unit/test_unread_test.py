"""A run can leave the test split unread, and read it when it is started again."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support import read_lines, tiny_config

from mltfr_dist.distributed.meeting import stop_ranks
from mltfr_dist.training.evaluating import compare
from mltfr_dist.training.run_folder import REPORT, load_result
from mltfr_dist.training.running.fit import fit


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    yield
    stop_ranks()


def test_the_test_split_is_read_when_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(
        tmp_path, baselines=["popularity", "backbone"], mltfr__consensus__enabled=False
    )
    asked: list[str] = []
    stream = compare.ranking_stream
    monkeypatch.setattr(
        compare,
        "ranking_stream",
        lambda c, split, *rest, **more: asked.append(split) or stream(c, split, *rest, **more),
    )
    unread = fit(config, verify=False, read_test=False)
    assert [result.test for result in unread] == [{}, {}, {}]
    assert "test" not in asked
    assert not (config.folder / REPORT).exists()
    assert "test" not in {line["kind"] for line in read_lines(config.folder / "metrics.jsonl")}

    read = fit(config)
    assert asked.count("test") == 3
    assert [result.valid for result in read] == [result.valid for result in unread]
    assert all(result.test["NDCG@10"] >= 0 for result in read)
    assert (config.folder / REPORT).exists()
    assert load_result(config.folder) == read[-1]
    assert fit(config, read_test=False)[-1] == read[-1], "a run that has read it stays as it is"
