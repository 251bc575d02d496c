"""The recipes of CONTRIBUTING.md, word for word: each registry line and its code give what they
promise.

Those for backbones and filter strategies are in models/test_backbones.py and
models/test_strategies.py."""

from __future__ import annotations

import importlib
import re
import sys
import textwrap
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import REPOSITORY, read_lines, tiny_config

from mltfr_dist import baselines, losses, metrics, optimizers, routers
from mltfr_dist.config import PrepareConfig
from mltfr_dist.data.prepare.run import prepare
from mltfr_dist.data.shards.manifest import read_manifest
from mltfr_dist.data.sources import formats, public_sets
from mltfr_dist.data.sources.fetch import sets_text
from mltfr_dist.distributed.meeting import stop_ranks
from mltfr_dist.distributed.ranks import ALONE
from mltfr_dist.tables.checkpoints import formats as checkpoint_formats
from mltfr_dist.tables.checkpoints import open_embedding
from mltfr_dist.training.evaluating.compare import baseline_result
from mltfr_dist.training.running.fit import fit

TEXT = (REPOSITORY / "CONTRIBUTING.md").read_text()


def section(title: str) -> str:
    return TEXT.partition(f"## A new {title}")[2].partition("\n## ")[0]


def registered(
    monkeypatch: pytest.MonkeyPatch, title: str, registry: dict[str, Any], names: Any
) -> str:
    """Add the section's registry line; returns the name."""
    line = re.search(r'`"([^"]+)": (\w+\(.*\)),`', section(title))
    assert line
    monkeypatch.setitem(registry, line[1], eval(line[2], dict(vars(names))))
    return line[1]


def with_code(monkeypatch: pytest.MonkeyPatch, title: str, module: str) -> None:
    """Run the section's code as a part of ``module``, which is made where it is missing."""
    source = textwrap.dedent(section(title).partition("```python\n")[2].partition("   ```")[0])
    result = types.ModuleType(module)
    exec(source, result.__dict__)
    try:
        standing = importlib.import_module(module)
    except ModuleNotFoundError:
        monkeypatch.setitem(sys.modules, module, result)
        return
    for name in re.findall(r"^(?:def|class) (\w+)", source, re.MULTILINE):
        monkeypatch.setattr(standing, name, getattr(result, name), raising=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    yield tmp_path_factory.mktemp("contributing")
    stop_ranks()


def trained(folder: Path, name: str, **changes: Any) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl of a run of two epochs."""
    changes = {"training__epochs": 2, "mltfr__consensus__enabled": False} | changes
    config = tiny_config(folder, name=name, **changes)
    fit(config)
    return read_lines(config.folder / "metrics.jsonl")


def steps(lines: list[dict[str, Any]]) -> list[float]:
    result = [line["loss"] for line in lines if "loss" in line]
    assert len(result) > 1
    return result


def test_a_router(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_code(monkeypatch, "router", "mltfr_dist.models.router")
    name = registered(monkeypatch, "router", routers.ROUTERS, routers)
    lines = trained(folder, "router", mltfr__router__name=name)
    gates = [v for line in lines for key, v in line.items() if key.startswith("gate_weight/")]
    assert len(gates) > 2
    assert gates == pytest.approx([0.5] * len(gates))


def test_a_loss_with_negatives(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_code(monkeypatch, "loss", "mltfr_dist.models.losses")
    name = registered(monkeypatch, "loss", losses.LOSSES, losses)
    result = steps(trained(folder, "loss", loss__name=name, loss__num_negatives=3))
    assert result[-1] < result[0] <= 1.1  # an untrained model's scores are equal: the margin


def test_a_metric(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = registered(monkeypatch, "metric", metrics.METRICS, metrics)
    lines = trained(folder, "metric", evaluation__select_by=f"{name}@10")
    valid = [line for line in lines if line["kind"] == "valid"]
    assert all(0 < line[f"{name}@10"] <= line["HR@10"] for line in valid)


def test_a_baseline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_code(monkeypatch, "baseline", "mltfr_dist.training.evaluating.baselines")
    name = registered(monkeypatch, "baseline", baselines.BASELINES, baselines)
    config = tiny_config(folder)
    manifest = read_manifest(config.data.path)
    result = baseline_result(name, config, manifest, ALONE, read_test=False)
    popular = baseline_result("popularity", config, manifest, ALONE, read_test=False)
    assert 0 < result.valid["MRR"] != popular.valid["MRR"]


def test_an_optimizer_and_its_checkpoint(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_code(monkeypatch, "optimizer", "mltfr_dist.optim")
    name = registered(monkeypatch, "optimizer", optimizers.OPTIMIZERS, optimizers)
    result = steps(trained(folder, "lion", optimizer__name=name, optimizer__learning_rate=1e-3))
    assert result[-1] < result[0]
    from safetensors.torch import load_file

    place = next((tiny_config(folder, name="lion").folder / "checkpoints").glob("train-step*"))
    kept = load_file(place / "optimizer.safetensors")
    assert {key.rpartition("/")[2] for key in kept} == {"exp_avg"}
    assert any(t.abs().sum() > 0 for t in kept.values())


def test_a_public_set(monkeypatch: pytest.MonkeyPatch) -> None:
    name = registered(monkeypatch, "public set", public_sets.PUBLIC_SETS, public_sets)
    assert name in sets_text()
    made = public_sets.PUBLIC_SETS[name]
    assert made.file == "mini.tsv"
    assert PrepareConfig(**made.options).format == "tsv"


def test_a_format_of_interactions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = registered(monkeypatch, "format of interactions", formats.NAMED, formats)
    monkeypatch.setitem(formats.FORMATS, name, formats.NAMED[name])
    rows = [f"u{u};i{i % 7};{100 * u + i}" for u in range(9) for i in range(8)]
    (tmp_path / "plays.csv").write_text("\n".join(["who;what;when", *rows]) + "\n")
    prepare([str(tmp_path / "plays.csv")], tmp_path / "data", PrepareConfig(format=name))
    assert read_manifest(tmp_path / "data").num_items == 7


def test_a_checkpoint_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = "mltfr_dist.tables.checkpoints.from_npy"
    with_code(monkeypatch, "checkpoint format", module)
    registered(monkeypatch, "checkpoint format", checkpoint_formats.FORMATS, checkpoint_formats)
    rows = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float16)
    np.save(tmp_path / "model.npy", rows)
    (tmp_path / "vocab.txt").write_text("\n".join(f"word{n}" for n in range(50)) + "\n")
    source = open_embedding(tmp_path / "model.npy")
    read = torch.cat([block for _, block in source.blocks()])
    assert torch.equal(read, torch.from_numpy(rows).float())
    assert source.read_vocabulary().tokens[7] == "word7"
