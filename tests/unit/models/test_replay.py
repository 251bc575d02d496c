"""A recorded pass gives what launching its kernels gives, whatever changes between two of them.

The recorder is one of this file: it does on the CPU what a CUDA graph does on a GPU, over memory
that stays where it is. `tests/gpu` has the real one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from mltfr_dist.config import RunConfig
from mltfr_dist.data.stream.training import BatchLayout
from mltfr_dist.distributed.ranks import ALONE
from mltfr_dist.errors import ConfigError
from mltfr_dist.models import at_once, mltfr, replay
from mltfr_dist.models.kernels import build
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.models.replay import Replay
from mltfr_dist.training.build import build_model
from mltfr_dist.training.inputs import load_inputs
from mltfr_dist.training.streams import train_stream


class Graph:
    """Operators with the very tensors that they read and left, to be run over them again."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.played = 0

    @torch.no_grad()
    def replay(self) -> None:
        self.played += 1
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for left, new in zip(tree_flatten(out)[0], tree_flatten(again)[0], strict=True):
                if isinstance(left, Tensor) and left.data_ptr() != new.data_ptr():
                    left.copy_(new)


class Recorder(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError("a recording cannot ask for numbers")
        self.graph.calls.append((func, args, kwargs or {}, out))
        return out


@contextmanager
def recording(graph: Graph, **_: Any) -> Iterator[None]:
    with Recorder(graph):
        yield


class Stream:
    def __init__(self, *_: Any) -> None:
        pass

    def wait_stream(self, _: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "library", lambda: None)
    monkeypatch.setattr(mltfr, "all_alike", lambda parts, _: at_once.may_be_one(parts))
    for name, value in {
        "graph": recording,
        "CUDAGraph": Graph,
        "Stream": Stream,
        "stream": lambda _: nullcontext(),
        "current_stream": Stream,
        "graph_pool_handle": lambda: (0, 0),
        "get_rng_state": lambda _: torch.get_rng_state(),
        "set_rng_state": lambda state, _: torch.set_rng_state(state),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)


def model_and_batches(folder: Path, **changes: Any) -> tuple[Recommender, list[Any]]:
    """Without dropout, whose draws on the CPU are no operators."""
    plain = {"backbone__dropout": 0.0, "mltfr__expert__dropout": 0.0}
    config: RunConfig = tiny_config(folder, **(plain | changes))
    torch.manual_seed(0)
    model = build_model(config, load_inputs(config, verify=False), with_consensus=True)
    size = config.training.global_batch_size
    stream = train_stream(config, BatchLayout(0, 1, size, size))
    batches = [s.micro_batches[0] for epoch in range(3) for s in stream.epoch(epoch)]
    return model.train(), batches


def trained(model: Recommender, batches: list[Any], player: Replay | None) -> list[float]:
    """Losses of some steps, with the shortlists chosen anew every four."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    model.replay, losses = player, []
    for step, batch in enumerate(batches):
        model.before_update(step, [batch], ALONE)
        output = model(batch.in_room(10))
        total = torch.stack([t.weight * t.sum for t in output.terms.values()]).sum()
        optimizer.zero_grad()
        (total / 100).backward()
        optimizer.step()
        losses.append(total.item())
        routing = output.routing
        if routing is not None:
            losses += routing.gate.tolist() + routing.kept_entropy.tolist()
            model.after_update(routing.gate / routing.gate.sum())
    return losses


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mltfr__enabled": False},
        {"mltfr__router__balance_weight": 0.1, "mltfr__consensus__learn_weight": True},
        {"loss__name": "sampled_softmax", "loss__num_negatives": 8},
        {"loss__name": "bce", "loss__num_negatives": 4},
    ],
    ids=["usual", "bare", "balanced", "sampled softmax", "bce"],
)
def test_played_steps_are_those_that_launch_their_kernels(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    """Over an optimizer that steps the parameters where they are, new shortlists, and batches of
    several shapes that come again.
    """
    model, batches = model_and_batches(tmp_path, **changes)
    launched = trained(model, batches, None)
    model, batches = model_and_batches(tmp_path, **changes)
    player = Replay(model)
    assert trained(model, batches, player) == pytest.approx(launched, rel=1e-5, abs=1e-6)
    assert player.records
    assert 1 < len(player._held) < len(batches)
    assert sum(r._forward.played for r in player._held.values()) == len(batches)  # type: ignore[attr-defined]


def gradients(model: Recommender) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_gradients_of_several_passes_add_up(tmp_path: Path) -> None:
    """Micro-batches of one shape leave their gradients in one place."""
    model, (batch, *_) = model_and_batches(tmp_path)
    batch = batch.in_room(10)
    other = batch._replace(item_ids=torch.where(batch.item_ids > 0, batch.item_ids % 20 + 1, 0))
    for some in (batch, other):
        model(some).terms["loss"].sum.backward()
    expected = gradients(model)
    model.zero_grad()
    model.replay = Replay(model)
    outputs = [model(some) for some in (batch, other)]
    sums = [o.terms["loss"].sum.item() for o in outputs]
    assert sums[0] != sums[1]
    model.zero_grad()
    for some in (batch, other):
        model(some).terms["loss"].sum.backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_hooks_on_gradients_see_only_what_is_played(tmp_path: Path) -> None:
    """Who looks for numbers that are not finite must not be shown a pass that is being recorded."""
    model, (batch, *_) = model_and_batches(tmp_path)
    seen: list[Tensor] = []
    model.backbone.item_embedding.weight.register_hook(seen.append)  # type: ignore[union-attr]
    model.replay = Replay(model)
    model(batch.in_room(10)).terms["loss"].sum.backward()
    assert len(seen) == 1
    assert seen[0].abs().sum() > 0


def test_what_has_moved_is_recorded_anew(tmp_path: Path) -> None:
    model, (batch, *_) = model_and_batches(tmp_path, mltfr__enabled=False)
    player = model.replay = Replay(model)
    first = model(batch.in_room(10)).terms["loss"].sum.item()
    weight = model.backbone.item_embedding.weight
    assert isinstance(weight, torch.nn.Parameter)
    weight.data = weight.data + 1
    moved = model(batch.in_room(10)).terms["loss"].sum.item()
    model.replay = None
    assert moved == pytest.approx(model(batch.in_room(10)).terms["loss"].sum.item(), rel=1e-6)
    assert moved != first
    assert len(player._held) == 1


def test_only_so_many_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MOST_HELD", 2)
    model, batches = model_and_batches(tmp_path, mltfr__enabled=False)
    launched = trained(model, batches, None)
    model, batches = model_and_batches(tmp_path, mltfr__enabled=False)
    player = Replay(model)
    assert trained(model, batches, player) == pytest.approx(launched, rel=1e-5)
    assert len(player._held) == 2


def test_who_counts_operators_sees_them(tmp_path: Path) -> None:
    model, (batch, *_) = model_and_batches(tmp_path)
    model.replay = Replay(model)
    model(batch.in_room(10))
    counted = Graph()
    with recording(counted):
        model(batch.in_room(10))
    assert len(counted.calls) > 100


def test_what_cannot_be_recorded_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another rank may be able to: gradients of one that launches would come in another order."""
    model, (batch, *_) = model_and_batches(tmp_path, mltfr__enabled=False)
    loss_sum = model._loss_sum
    monkeypatch.setattr(
        model, "_loss_sum", lambda scored: loss_sum(scored) * float(scored.weights.max())
    )
    model.replay = Replay(model)
    with pytest.raises(ConfigError, match="cannot ask for numbers"):
        model(batch.in_room(10))


@pytest.mark.parametrize("records", [True, False])
def test_gradients_come_in_one_order(records: bool, tmp_path: Path) -> None:
    """Launched, counted or played."""
    model, (batch, *_) = model_and_batches(tmp_path)
    come: list[str] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda _, name=name: come.append(name))
    model.replay = Replay(model)
    model.replay.records = records
    model(batch.in_room(10)).terms["loss"].sum.backward()
    with recording(Graph()):
        model(batch.in_room(10)).terms["loss"].sum.backward()
    half = len(come) // 2
    assert half > 30
    assert come[:half] == come[half:]
