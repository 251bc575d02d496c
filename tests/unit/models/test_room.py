"""A batch with room for more positions than it has, as a GPU's passes are recorded, gives what the
batch itself gives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny_config
from torch import Tensor

from mltfr_dist.backbones import BACKBONES
from mltfr_dist.config import RunConfig
from mltfr_dist.data.batch import PADDING_IDX, Counts, Room, SequenceBatch
from mltfr_dist.data.stream.training import BatchLayout
from mltfr_dist.models import at_once, mltfr, replay
from mltfr_dist.models.backbone import Backbone, backbone_class
from mltfr_dist.models.kernels import build
from mltfr_dist.models.output import TrainingOutput
from mltfr_dist.models.packing import Packing
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.training.build import build_model
from mltfr_dist.training.inputs import load_inputs
from mltfr_dist.training.running.fit import fit
from mltfr_dist.training.streams import train_stream

PACKED = [
    name
    for name in BACKBONES
    if backbone_class(name).pack is Backbone.pack and not backbone_class(name).contrasts_views
]
CASES: dict[str, dict[str, Any]] = {
    **{name: {"backbone__name": name} for name in PACKED},
    **{f"bare {name}": {"backbone__name": name, "mltfr__enabled": False} for name in PACKED},
    "sampled softmax": {"loss__name": "sampled_softmax", "loss__num_negatives": 8},
    "bce": {"loss__name": "bce", "loss__num_negatives": 4},
    "gbce": {"loss__name": "gbce", "loss__num_negatives": 4},
    "a query a position": {"mltfr__filter__query_every": 1},
    "few queries": {"mltfr__filter__query_every": 7},
    "balanced, two a table": {
        "mltfr__router__balance_weight": 0.1,
        "mltfr__router__top_k": 2,
        "mltfr__router__null_expert": True,
        "mltfr__expert__per_table": 2,
    },
}


def model_and_batches(folder: Path, changes: dict[str, Any]) -> tuple[Recommender, list[Any]]:
    plain = {"backbone__dropout": 0.0, "mltfr__expert__dropout": 0.0}
    config: RunConfig = tiny_config(folder, **(plain | changes))
    torch.manual_seed(0)
    model = build_model(config, load_inputs(config, verify=False), with_consensus=True)
    size = config.training.global_batch_size
    steps = list(train_stream(config, BatchLayout(0, 1, size, size)).epoch(0))
    return model.train(), [steps[0].micro_batches[0], steps[-1].micro_batches[0]]


def numbers(model: Recommender, batch: SequenceBatch) -> dict[str, Tensor]:
    """All sums and gradients of a pass."""
    model.zero_grad()
    output = model(batch)
    assert isinstance(output, TrainingOutput)
    sums = {name: term.sum for name, term in output.terms.items()}
    torch.stack(list(sums.values())).sum().backward()
    result = {name: total.detach() for name, total in sums.items()}
    result |= {} if output.routing is None else output.routing._asdict()
    return result | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "library", lambda: None)
    monkeypatch.setattr(mltfr, "all_alike", lambda parts, _: at_once.may_be_one(parts))


@pytest.mark.parametrize("name", CASES)
def test_places_beyond_the_real_ones_count_for_nothing(name: str, tmp_path: Path) -> None:
    model, batches = model_and_batches(tmp_path, CASES[name])
    for batch in batches:
        roomy = batch.in_room(11 if model.backbone.num_special_positions else 10)
        assert roomy.room.positions > sum(batch.lengths)
        plain, padded = numbers(model, batch), numbers(model, roomy)
        assert plain.keys() == padded.keys()
        for key, value in plain.items():
            torch.testing.assert_close(padded[key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_a_batch_of_nobody_has_room_too(tmp_path: Path) -> None:
    model, (batch, _) = model_and_batches(tmp_path, {})
    nobody = batch._replace(
        item_ids=torch.zeros_like(batch.item_ids), target_ids=torch.zeros_like(batch.item_ids)
    ).counted()
    found = numbers(model, nobody.in_room(10))
    assert not any(found[name].any() for name, p in model.named_parameters() if name in found)
    assert all(found[name].isfinite().all() for name in found)


def test_room_may_be_for_as_many_as_there_are_places() -> None:
    """Though there is padding in front of the last ones."""
    ids = torch.randint(1, 20, (31, 16))
    ids[0, 10:] = PADDING_IDX
    batch = SequenceBatch(ids, ids, torch.arange(31)).counted().in_room(16)
    assert batch.room is not None
    assert batch.room.positions == batch.item_ids.numel()
    packing = Packing(batch.item_ids, room=batch.room.positions)
    packed = packing.pack(batch.item_ids)
    assert torch.equal(packed[:490], ids[ids != PADDING_IDX])
    assert not packed[490:].any()
    assert torch.equal(packing.unpack(packed)[:31], ids)


def test_room_is_a_little_more_than_is_needed() -> None:
    sizes = set()
    for count in range(1, 5000):
        room = Room.for_counts(Counts((count,), count))
        assert count < room.positions <= max(count + 16, 1.126 * (count + 1))
        assert count <= room.targets <= max(count + 15, 1.126 * count)
        sizes.add(room.positions)
    assert len(sizes) < 70


def test_a_batch_in_room_has_an_empty_row_behind_and_keeps_its_negatives() -> None:
    ids = torch.tensor([[1, 2, 3], [4, 0, 0]])
    batch = SequenceBatch(ids, ids, torch.arange(2), ids[..., None].expand(2, 3, 5)).counted()
    roomy = batch.in_room(50)
    assert roomy.item_ids.shape == roomy.target_ids.shape == (3, 16)
    assert torch.equal(roomy.item_ids[:2, :3], ids)
    assert not (roomy.item_ids[:, 3:] != PADDING_IDX).any()
    assert not (roomy.item_ids[2] != PADDING_IDX).any()
    assert roomy.sample_ids.tolist() == [0, 1, -1]
    assert roomy.negative_ids is not None
    assert roomy.negative_ids.shape == (3, 16, 5)
    assert batch.in_room(3).item_ids.shape == (3, 3)


def test_only_what_follows_from_a_shape_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = torch.device("cuda")
    model, _ = model_and_batches(tmp_path, {})
    assert replay.why_launched(model, gpu) is None
    assert replay.why_launched(model, torch.device("cpu")) == "the model is not on a CUDA GPU"
    for reason, changes in {
        "contrasts views": {"backbone__name": "cl4srec"},
        "shortlists of one size": {"mltfr__filter__shortlist_size": None},
        "no noise": {"mltfr__filter__noise": 0.5},
        "computes on padding": {"backbone__name": "bsarec_original", "data__samples": "prefixes"},
        "made of tokens": {"mltfr__item_tokens__source": "titles"},
    }.items():
        other, _ = model_and_batches(tmp_path, changes)
        assert reason in str(replay.why_launched(other, gpu)), changes
    monkeypatch.setattr(replay, "MOST_TRAINED", 100)
    assert "more than 100: kernels take" in str(replay.why_launched(model, gpu))


def test_who_asks_for_what_cannot_be_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(replay.SWITCH, "on")
    fit(tiny_config(tmp_path, training__epochs=1, mltfr__enabled=False))
    said = capsys.readouterr().out
    assert "MLTFR_GRAPHS=on: passes are launched kernel by kernel all the same" in said
    assert "not on a CUDA GPU" in said
