"""Optimizers by name: what is registered is what torch computes, and what ZeRO cannot serve is
refused.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import REPOSITORY, read_lines, tiny_config
from torch import nn

from mltfr_dist.config import OptimizerConfig
from mltfr_dist.data.stream.training import BatchLayout
from mltfr_dist.distributed.deepspeed_file import deepspeed_config, sharding_file
from mltfr_dist.distributed.meeting import stop_ranks
from mltfr_dist.errors import ConfigError
from mltfr_dist.optim import build_optimizer, learning_rate
from mltfr_dist.optimizers import OPTIMIZERS, Entry
from mltfr_dist.training.running.fit import fit


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_registry_names_the_whole_state(name: str) -> None:
    """What is registered is what the optimizer keeps in tensors of the parameter's shape."""
    trained = model()
    optimizer = build_optimizer(trained, OptimizerConfig(name=name, weight_decay=0.1), fused=False)
    trained(torch.tensor([1, 2])).sum().backward()
    optimizer.step()
    for p in trained.parameters():
        kept = {key for key, t in optimizer.state[p].items() if t.shape == p.shape}
        assert kept == set(OPTIMIZERS[name].state)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_of_zeros_is_that_before_the_first_update(name: str) -> None:
    config, trained = OptimizerConfig(name=name, weight_decay=0.1), (model(), model())
    optimizers = [build_optimizer(one, config, fused=False) for one in trained]
    for p in trained[1].parameters():
        zeros = {key: torch.zeros_like(p) for key in OPTIMIZERS[name].state}
        optimizers[1].state[p] = zeros | {"step": torch.tensor(0.0)}
    for one, optimizer in zip(trained, optimizers):
        for _ in range(3):
            optimizer.zero_grad()
            one(torch.tensor([1, 2])).square().sum().backward()
            optimizer.step()
    for a, b in zip(trained[0].parameters(), trained[1].parameters()):
        assert torch.equal(a, b)


def test_matrices_alone_decay() -> None:
    trained = model()
    groups = build_optimizer(trained, OptimizerConfig(weight_decay=0.1), fused=False).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert [id(p) for p in groups[0]["params"]] == [id(trained[1].weight)]


def test_the_learning_rate_rises_stays_and_falls() -> None:
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4, schedule="cosine")
    rates = [learning_rate(config, step, 12) for step in range(13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:9:4] == pytest.approx([1.0, 0.5])
    assert rates[12] == 0.0
    assert learning_rate(OptimizerConfig(learning_rate=1.0), 10**6, 12) == 1.0


def test_zero_refuses_an_optimizer_that_looks_at_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_shape = Entry("optim:sgd", "looks at shapes", ("momentum_buffer",), elementwise=False)
    monkeypatch.setitem(OPTIMIZERS, "by_shape", by_shape)
    layout = BatchLayout(0, 1, 32, 32)
    for stage in (1, 2, 3):
        file = str(REPOSITORY / "ds_configs" / f"zero{stage}.json")
        config = tiny_config(tmp_path, optimizer__name="by_shape", deepspeed=file)
        with pytest.raises(ConfigError, match=f"optimizer.name=by_shape with ZeRO stage {stage}"):
            deepspeed_config(config, layout, 100)
    file = str(REPOSITORY / "ds_configs" / "zero0.json")
    config = tiny_config(tmp_path, optimizer__name="by_shape", deepspeed=file)
    assert "zero_optimization" in deepspeed_config(config, layout, 100)


@pytest.mark.parametrize(
    ("changes", "world_size", "num_items", "stage"),
    [
        ({}, 1, 10**9, 0),
        ({}, 2, 1_000_000, 0),  # x 64 numbers x 8 bytes: 488 MiB
        ({}, 2, 1_100_000, 1),
        ({"training__precision": "bf16"}, 1, 100, 1),
        ({"optimizer__name": "by_shape"}, 2, 10**9, 0),
    ],
)
def test_stage_1_is_the_default_where_it_is_needed_or_saves_much(
    changes: dict[str, str],
    world_size: int,
    num_items: int,
    stage: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    by_shape = Entry("optim:sgd", "looks at shapes", ("momentum_buffer",), elementwise=False)
    monkeypatch.setitem(OPTIMIZERS, "by_shape", by_shape)
    config = tiny_config(tmp_path, deepspeed=None, backbone__hidden_dim=64, **changes)
    file = sharding_file(config, world_size, num_items)
    assert file == Path(f"ds_configs/zero{stage}.json")
    layout = BatchLayout(0, world_size, 32, 32 // world_size)
    assert "zero_optimization" in deepspeed_config(config, layout, num_items)
    own = tiny_config(tmp_path, deepspeed="mine.json", **changes)
    assert sharding_file(own, world_size, num_items) == Path("mine.json")


def test_the_norm_of_gradients_is_logged_alike_at_stages_0_and_1(tmp_path: Path) -> None:
    norms = {}
    for stage in (0, 1):
        file = str(REPOSITORY / "ds_configs" / f"zero{stage}.json")
        config = tiny_config(
            tmp_path, name=f"stage{stage}", deepspeed=file, training__log_every_steps=2
        )
        fit(config)
        lines = read_lines(config.folder / "metrics.jsonl")
        norms[stage] = [line["grad_norm"] for line in lines if line["kind"] == "step"]
    stop_ranks()
    assert len(norms[0]) > 2
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
