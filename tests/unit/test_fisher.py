"""The Fisher from one backward pass a batch equals the one from a loop over single samples."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import tiny_config

from mltfr_dist.config import RunConfig
from mltfr_dist.data.batch import PADDING_IDX, SequenceBatch
from mltfr_dist.data.stream.training import BatchLayout
from mltfr_dist.distributed.fisher import fisher_diagonals
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.training.build import build_model
from mltfr_dist.training.inputs import load_inputs
from mltfr_dist.training.streams import train_stream

ONE = Ranks(0, 1, torch.device("cpu"))


def setup(folder: Path) -> tuple[RunConfig, Recommender, SequenceBatch]:
    config = tiny_config(folder)
    model = build_model(config, load_inputs(config), with_consensus=False)
    batch = next(train_stream(config, BatchLayout(0, 1, 16, 16)).epoch(0)).micro_batches[0]
    return config, model, batch


def test_equals_a_loop_over_samples(tmp_path: Path) -> None:
    _, model, batch = setup(tmp_path)
    result = fisher_diagonals(model, [batch], ONE, 16)
    model.eval()
    for m, core in enumerate(model.mltfr.cores):
        expected = {name: torch.zeros_like(p) for name, p in core.named_parameters()}
        for row in range(16):
            single = SequenceBatch(*(None if t is None else t[row : row + 1] for t in batch[:-1]))
            loss = model(single).terms["loss"].sum / (single.target_ids != PADDING_IDX).sum()
            names, parameters = zip(*core.named_parameters(), strict=True)
            for name, gradient in zip(names, torch.autograd.grad(loss, parameters), strict=True):
                expected[name] += gradient.square() / 16
        for name, value in expected.items():
            scale = max(float(value.max()), 1e-12)
            assert (result[m][name] - value).abs().max() < 1e-4 * scale, name


@pytest.mark.parametrize("name", ["bert4rec", "cl4srec"])
def test_a_sample_counts_by_its_scored_positions_and_by_the_recommendation_loss(
    tmp_path: Path, name: str
) -> None:
    own = {"backbone__cl4srec__contrast_group": 4} if name == "cl4srec" else {}
    config = tiny_config(tmp_path, backbone__name=name, **own)
    model = build_model(config, load_inputs(config), with_consensus=False)
    batch = next(train_stream(config, BatchLayout(0, 1, 16, 16)).epoch(0)).micro_batches[0]
    result = fisher_diagonals(model, [batch], ONE, 16)[0]["value.weight"]
    model.eval()
    weight = model.mltfr.cores[0].value.weight
    expected = torch.zeros_like(weight)
    for row in range(16):
        single = SequenceBatch(*(t[row : row + 1] for t in batch[:3]))
        loss = model(single).terms["loss"].sum / (single.target_ids != PADDING_IDX).sum()
        expected += torch.autograd.grad(loss, weight)[0].square() / 16
    assert (result - expected).abs().max() < 1e-4 * expected.max()


def test_is_not_the_square_of_the_mean_gradient(tmp_path: Path) -> None:
    """Defect D12: the published estimate shrinks with the batch; ours must not be it."""
    _, model, batch = setup(tmp_path)
    result = fisher_diagonals(model, [batch], ONE, 16)[0]["value.weight"]
    model.eval()
    lengths = (batch.target_ids != PADDING_IDX).sum(1, keepdim=True)
    loss = model(batch, (1 / lengths / 16).expand_as(batch.target_ids)).terms["loss"].sum
    (gradient,) = torch.autograd.grad(loss, [model.mltfr.cores[0].value.weight])
    assert result.sum() > 1.5 * gradient.square().sum()


def test_samples_beyond_the_number_asked_for_do_not_count(tmp_path: Path) -> None:
    config, model, _ = setup(tmp_path)
    stream = train_stream(config, BatchLayout(0, 1, 16, 16))
    few = fisher_diagonals(model, [next(stream.epoch(0)).micro_batches[0]], ONE, 10)
    many = fisher_diagonals(
        model, [b for step in stream.epoch(0) for b in step.micro_batches], ONE, 10
    )
    for a, b in zip(few, many, strict=True):
        for name in a:
            torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-12)


def test_leaves_parameters_gradients_and_mode_alone(tmp_path: Path) -> None:
    _, model, batch = setup(tmp_path)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model.train()
    fisher_diagonals(model, [batch], ONE, 16)
    assert model.training
    assert all(
        torch.equal(before[name], p) and p.grad is None for name, p in model.named_parameters()
    )
    assert all(core._taps is None for core in model.mltfr.cores)
