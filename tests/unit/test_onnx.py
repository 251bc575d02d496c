"""ONNX models score as the run does, for batches and histories of any size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from support import tiny_config
from test_export import as_loaded

from mltfr_dist.backbones import BACKBONES
from mltfr_dist.config import RunConfig
from mltfr_dist.errors import CheckpointError, ConfigError
from mltfr_dist.exported import load_exported, read_info
from mltfr_dist.ranking import score_histories
from mltfr_dist.serving.dense import DenseModel
from mltfr_dist.training.build import build_model
from mltfr_dist.training.inputs import load_inputs
from mltfr_dist.training.using.export import publish
from mltfr_dist.training.using.inference import LoadedRun
from mltfr_dist.training.using.onnx import check_expressible, check_onnx, write_onnx

BACKBONE: dict[str, dict[str, Any]] = {
    name: {"backbone__name": name}
    | (
        {"data__samples": "prefixes"}
        if name in ("fmlp_original", "bsarec_original", "linrec_original")
        else {}
    )
    for name in BACKBONES
}
ARMS: dict[str, dict[str, Any]] = {
    **{f"{name}, bare": fields | {"mltfr__enabled": False} for name, fields in BACKBONE.items()},
    **BACKBONE,
    "whole tables": {"mltfr__filter__shortlist_size": None},
    "all rows": {"mltfr__filter__strategy": "direct"},
    "prototypes": {"mltfr__filter__strategy": "learned_prototypes"},
    "titles": {"mltfr__item_tokens__source": "titles"},
    "two experts, top two, null": {
        "mltfr__expert__per_table": 2,
        "mltfr__router__top_k": 2,
        "mltfr__router__null_expert": True,
        "mltfr__consensus__group": ["second"],
        "mltfr__filter__query_every": 3,
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("onnx")


def loaded_run(config: RunConfig) -> LoadedRun:
    """A model with weights as if trained."""
    inputs = load_inputs(config)
    model = build_model(config, inputs, with_consensus=config.mltfr.enabled).eval()
    draw = torch.Generator().manual_seed(1)
    state = model.state_dict()
    for name, t in state.items():
        if t.is_floating_point():
            state[name] = t + 0.1 * torch.randn(t.shape, generator=draw)
    model.load_state_dict(state)
    return as_loaded(config, inputs, model)


@pytest.mark.parametrize("arm", ARMS)
def test_shapes_that_know_no_lengths_change_no_score(folder: Path, arm: str) -> None:
    run = loaded_run(tiny_config(folder, **ARMS[arm]))
    dense = DenseModel(run.model, run.max_len).eval()
    batches = (
        torch.tensor([[1, 2, 3, 4, 5], [7, 0, 0, 0, 0], [40, 39, 40, 0, 0]]),
        torch.randint(1, 41, (2, 10), generator=torch.Generator().manual_seed(2)),
    )
    for item_ids in batches:
        with torch.no_grad():
            scores, users = dense(item_ids)
        expected = score_histories(run.model, item_ids)
        torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)
        products = users @ torch.from_numpy(run.item_vectors()).T
        torch.testing.assert_close(products[:, 1:], expected[:, 1:], rtol=1e-5, atol=1e-6)


QUICK = ("sasrec", "fmlp_original, bare")


@pytest.mark.parametrize(
    "arm", [*QUICK, *(pytest.param(a, marks=pytest.mark.slow) for a in ARMS if a not in QUICK)]
)
def test_onnxruntime_scores_as_the_run(folder: Path, tmp_path: Path, arm: str) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name, reason=f"`pip install 'mltfr-dist[onnx]'` (no {name} here)")
    run = loaded_run(tiny_config(folder, **ARMS[arm]))
    publish(run, tmp_path / "model", write_onnx, check_onnx, "onnx")
    assert {path.name for path in (tmp_path / "model").iterdir()} == {
        *("README.md", "config.json", "items.parquet", "model.onnx"),
    }
    assert read_info(tmp_path / "model").format == "onnx"
    with pytest.raises(CheckpointError, match=r"is an ONNX export.*Open .*with onnxruntime"):
        load_exported(tmp_path / "model")
    run.model.backbone.item_embedding.weight.data += 0.01
    with pytest.raises(CheckpointError, match="scores differ from those of the run"):
        check_onnx(run, tmp_path / "model")
    ids = pq.read_table(tmp_path / "model" / "items.parquet")["item_id"].to_pylist()
    assert ids == run.item_ids[1:]


REFUSED: dict[str, dict[str, Any]] = {
    "mltfr.filter.strategy=random_tokens": {"mltfr__filter__strategy": "random_tokens"},
    "published.pooled_memory=true": {"published__pooled_memory": True},
    "published.straight_through=true": {"published__straight_through": True},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_onnx_cannot_express_is_named(folder: Path, name: str) -> None:
    run = loaded_run(tiny_config(folder, **REFUSED[name]))
    with pytest.raises(ConfigError, match=f"has {name}, which ONNX cannot express"):
        check_expressible(run)


def test_without_the_packages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = loaded_run(tiny_config(folder))

    def refuse(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr("mltfr_dist.training.using.onnx.import_module", refuse)
    with pytest.raises(ConfigError, match=r"onnx, onnxscript, onnxruntime are not installed"):
        check_expressible(run)
