"""An item table whose lookups are what training differentiates, and the optimizer that steps its
rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import tiny_config
from torch import nn

from mltfr_dist.config import OptimizerConfig
from mltfr_dist.distributed.meeting import start_ranks, stop_ranks
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.distributed.row_adam import RowAdam
from mltfr_dist.models.item_rows import ItemRows
from mltfr_dist.training.build import build_model
from mltfr_dist.training.inputs import load_inputs


def embedding(sparse: bool = False) -> nn.Embedding:
    torch.manual_seed(3)
    return nn.Embedding(9, 4, padding_idx=0, sparse=sparse)


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    yield start_ranks(1)
    stop_ranks()


def test_a_lookup_is_that_of_the_embedding_and_leaves_a_gradient_in_training_alone() -> None:
    rows, plain, ids = ItemRows(embedding()), embedding(), torch.tensor([[3, 0], [3, 8]])
    assert rows(ids).equal(plain(ids))
    assert list(rows.parameters()) == []
    rows(ids).sum().backward()
    rows(ids[:0])  # looked up, and not part of the loss
    assert len(rows.take_gradients()) == 1, "the first lookup was not differentiated"
    with torch.no_grad():
        assert not rows(ids).requires_grad
    assert not rows.eval()(ids).requires_grad
    assert rows.take_gradients() == []
    rows.dtype = torch.bfloat16
    assert rows(ids).dtype == torch.bfloat16
    assert rows.weight.dtype == torch.float32


def test_updates_are_those_of_sparse_adam(ranks: Ranks) -> None:
    rows, plain = ItemRows(embedding()), embedding(sparse=True)
    adam = RowAdam("table", rows, OptimizerConfig(betas=(0.8, 0.9)), ranks)
    reference = torch.optim.SparseAdam(plain.parameters(), lr=0.1, betas=(0.8, 0.9))
    generator = torch.Generator().manual_seed(0)
    for step in range(6):
        for _ in range(2):
            ids = torch.randint(5 if step % 2 else 9, (3, 2), generator=generator)
            for module in (rows, plain):
                (module(ids) ** 3).sum().backward()
            adam.collect()
        plain.weight.grad.mul_(0.5)
        reference.step()
        reference.zero_grad()
        adam.reduce()
        adam.step(0.1, 0.5)
        torch.testing.assert_close(rows.weight, plain.weight.detach(), rtol=1e-6, atol=1e-7)
    assert not rows.weight[0].any(), "padding stays zero"
    before = rows.weight.clone()
    adam.collect()
    adam.reduce()
    adam.step(0.1, 1.0)  # of a batch without items
    assert rows.weight.equal(before)
    assert adam.num_updates == 7


def test_a_model_is_saved_under_the_same_names_and_counts_its_rows(tmp_path: Path) -> None:
    for source in ("none", "titles"):
        models = []
        for kind in ("dense", "sparse"):
            changes = {
                "loss__name": "bce",
                "mltfr__item_tokens__source": source,
                "optimizer__item_gradients": kind,
            }
            config = tiny_config(tmp_path, **changes)
            models.append(build_model(config, load_inputs(config), with_consensus=False))
        first, second = (model.state_dict() for model in models)
        assert set(first) == set(second)
        assert all(first[name].equal(second[name]) for name in first), "another initialisation"
        assert (
            models[0].num_trained
            == models[1].num_trained
            == sum(p.numel() for p in models[0].parameters() if p.requires_grad)
        )
