"""`mltfr index`: vectors and ids as they are, recall as counted, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from support import tiny_config, write_data
from test_export import as_loaded

from mltfr_dist.cli import main as mltfr
from mltfr_dist.config import RunConfig
from mltfr_dist.config.index import IndexConfig
from mltfr_dist.distributed.meeting import stop_ranks
from mltfr_dist.errors import EXIT_BAD_INPUT, CheckpointError, ConfigError
from mltfr_dist.serving import vector_index
from mltfr_dist.serving.recall import exact, of_index
from mltfr_dist.serving.scoring import item_vectors
from mltfr_dist.serving.vector_index import build, faiss, plan
from mltfr_dist.training.build import build_model
from mltfr_dist.training.inputs import load_inputs
from mltfr_dist.training.running.fit import fit
from mltfr_dist.training.using import index as module
from mltfr_dist.training.using.export import publish
from mltfr_dist.training.using.index import write_index, write_vectors
from mltfr_dist.training.using.inference import LoadedRun, load_run

pytest.importorskip("faiss", reason="`pip install 'mltfr-dist[index]'`")

NUM_ITEMS = 500


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunConfig]:
    """A finished run over enough items for codes."""
    folder = tmp_path_factory.mktemp("index")
    write_data(folder, num_items=NUM_ITEMS, num_users=300)
    config = tiny_config(folder, training__epochs=1, mltfr__enabled=False, mltfr__tables=[])
    fit(config)
    yield config
    stop_ranks()


def random_vectors(count: int, dim: int = 16) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, dim)).astype(np.float32)


def test_vectors_ids_and_index_belong_together(run: RunConfig, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    assert mltfr(["index", str(run.folder), "--output", str(folder), "--type", "flat"]) == 0
    loaded = load_run(run.folder)
    vectors = np.load(folder / "item_vectors.npy", allow_pickle=False)
    assert np.array_equal(vectors, item_vectors(loaded.model)[1:].numpy())
    items = pq.read_table(folder / "items.parquet")
    assert items["item_id"].to_pylist() == loaded.item_ids[1:]
    index = faiss().read_index(str(folder / "index.faiss"))
    histories = [loaded.item_ids[1:4], loaded.item_ids[7:9]]
    scores, rows = index.search(loaded.user_vectors(histories), 5)
    expected = loaded.recommend(histories, 5, filter_seen=False)
    assert [items["item_id"].take(row).to_pylist() for row in rows] == expected.item_ids
    np.testing.assert_allclose(scores, expected.scores, rtol=1e-5)
    info = json.loads((folder / "index.json").read_text())
    ways = {way["name"]: way["recall"] for way in info["measured"]}
    assert ways["exact"] == 1
    assert ways["index"] > 0.999  # float32 sums may part near-ties
    assert set(info["sha256"]) == {"item_vectors.npy", "items.parquet", "index.faiss"}
    assert (folder / "report.md").read_text().count("|") > 12
    assert {p.name for p in tmp_path.iterdir()} == {"index"}


@pytest.mark.parametrize("kind", ["ivf", "pq", "ivf_pq"])
def test_recall_is_what_is_found(kind: Any) -> None:
    vectors, users = random_vectors(2000), random_vectors(50)
    planned = plan(IndexConfig(type=kind, nlist=40 if "ivf" in kind else None), 2000, 16)
    index = build(vectors, planned)
    best, exactly = exact(users, vectors, 10)
    expected = np.argsort(-(users.astype(np.float64) @ vectors.T.astype(np.float64)))[:, :10]
    assert np.array_equal(best, expected)
    assert exactly.recall == 1
    result = of_index(index, users, best, None, 0.9, planned.nlist)
    rows = index.search(users, 10)[1]
    by_hand = np.mean([len({*a} & {*b}) / 10 for a, b in zip(expected, rows, strict=True)])
    assert result[-1].recall == pytest.approx(by_hand)
    if kind == "ivf":
        assert 0.9 <= result[-1].recall < 1
        assert len(result) > 1  # one list did not do
        assert index.nprobe == int(result[-1].name.split()[1]) < 40


def test_blocks_change_nothing(
    run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_run(run.folder)
    whole = write_vectors(loaded, tmp_path / "whole.npy")
    monkeypatch.setattr(module, "BLOCK_BYTES", 4 * 16 * 7)
    monkeypatch.setattr(vector_index, "BLOCK_BYTES", 4 * 16 * 7)
    assert np.array_equal(write_vectors(loaded, tmp_path / "parts.npy"), whole)
    index = build(whole, plan(IndexConfig(type="flat"), len(whole), 16))
    assert np.array_equal(index.reconstruct_n(0, len(whole)), whole)


def test_items_with_titles_tokens_are_indexed_as_they_score(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, mltfr__item_tokens__source="titles")
    inputs = load_inputs(config)
    loaded: LoadedRun = as_loaded(config, inputs, build_model(config, inputs, with_consensus=False))
    vectors = write_vectors(loaded, tmp_path / "vectors.npy")
    users = loaded.user_vectors([["i1", "i2"]])
    scores = loaded.scores([["i1", "i2"]])[:, 1:]
    np.testing.assert_allclose(users @ vectors.T, scores, rtol=1e-4, atol=1e-6)


def test_an_export_needs_histories_and_takes_them(run: RunConfig, tmp_path: Path) -> None:
    publish(load_run(run.folder), tmp_path / "model")
    with pytest.raises(ConfigError, match=r"is an export, and holds no histories.*--histories"):
        write_index(tmp_path / "model", tmp_path / "index", IndexConfig())
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
    given = tmp_path / "users.jsonl"
    given.write_text('{"history": ["i1", "i2"]}\n{"history": ["i3"]}\n')
    info = write_index(tmp_path / "model", tmp_path / "index", IndexConfig(nprobe=2), given)
    assert (info.num_histories, info.nprobe) == (2, 2)
    assert [way["name"] for way in info.measured] == ["exact", "nprobe 2"]


REFUSED = {
    "k": (IndexConfig(k=501), "--k is 501, and the model has 500 items"),
    "nlist": (IndexConfig(nlist=600), "--nlist is 600, and the model has 500"),
    "nprobe": (IndexConfig(nlist=5, nprobe=6), "--nprobe is 6, and there are 5 lists"),
    "bytes": (IndexConfig(type="pq", code_bytes=3), r"--code-bytes is 3.*Give one of 1, 2, 4, 8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_the_items(name: str) -> None:
    config, words = REFUSED[name]
    with pytest.raises(ConfigError, match=words):
        plan(config, NUM_ITEMS, 16)
    with pytest.raises(ConfigError, match="Codes are learned from at least 256"):
        plan(IndexConfig(type="ivf_pq"), 255, 16)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--nlist", "4", "--type", "flat"], "nlist belongs to the types ivf and ivf_pq"),
        (["--code-bytes", "4"], "code_bytes belongs to the types pq and ivf_pq"),
        (["--nprobe", "4", "--recall", "0.9"], "nprobe and recall exclude each other"),
    ],
)
def test_options_that_exclude_each_other(
    given: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["index", "no-run", "--output", str(tmp_path / "x"), *given]
    assert mltfr(command) == EXIT_BAD_INPUT
    assert words in capsys.readouterr().err


def test_nothing_is_overwritten_or_left(
    run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match=r"there exists.*never overwrites"):
        write_index(run.folder, tmp_path / "there", IndexConfig())
    with pytest.raises(CheckpointError, match=r"no run|holds no"):
        write_index(tmp_path / "no-run", tmp_path / "index", IndexConfig())
    # a disk that is full once the index is written
    monkeypatch.setattr(module, "INDEX", "no/such/folder")
    with pytest.raises(Exception, match="no/such/folder"):
        write_index(run.folder, tmp_path / "index", IndexConfig())
    assert {path.name for path in tmp_path.iterdir()} == {"there"}


def test_without_faiss(run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(vector_index, "import_module", refuse)
    with pytest.raises(ConfigError, match=r"faiss is not installed.*mltfr-dist\[index\]"):
        write_index(run.folder, tmp_path / "index", IndexConfig())


def test_a_model_that_diverged(run: RunConfig, tmp_path: Path) -> None:
    loaded = load_run(run.folder)
    with torch.no_grad():
        loaded.model.backbone.item_embedding.weight[3, 0] = torch.nan
    with pytest.raises(CheckpointError, match="not finite: the model has diverged"):
        write_vectors(loaded, tmp_path / "vectors.npy")
