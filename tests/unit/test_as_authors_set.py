"""What MLTFR's authors set beside its defects: each a value, and preset `paper` has all of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import REPOSITORY, new_mltfr, tiny_config
from torch.nn import functional as F

from mltfr_dist.config import BackboneConfig, MLTFRConfig, PublishedConfig, RunConfig
from mltfr_dist.config.published import NEEDS
from mltfr_dist.data.shards.manifest import load_manifest
from mltfr_dist.data.shards.reader import read_shard
from mltfr_dist.data.stream.training import BatchLayout, TrainStream
from mltfr_dist.errors import ConfigError
from mltfr_dist.models.packing import Packing
from mltfr_dist.models.sasrec_original import OriginalBlock, OriginalSASRec
from mltfr_dist.presets import preset
from mltfr_dist.repairs import ALSO_PUBLISHED
from mltfr_dist.training.streams import train_stream


def value(config: RunConfig, path: str) -> Any:
    place: Any = config
    for name in path.split("."):
        place = getattr(place, name)
    return place


def test_preset_paper_has_what_the_authors_set_and_the_documentation_says_so() -> None:
    config = preset("paper")
    text = (REPOSITORY / "docs" / "method.md").read_text()
    for fields in ALSO_PUBLISHED.values():
        for path, wanted in fields.items():
            assert value(config, path) == wanted
            assert path.rpartition(".")[2] in text
    assert config.backbone == BackboneConfig(
        name="sasrec_original",
        num_heads=8,
    )
    assert config.optimizer.betas == (0.9, 0.999)
    assert config.loss.name == "bce"
    of_others = {"whole_sequence_filter", "read_before_mask", "attending_padding", "double_softmax"}
    assert set(config.published.on()) == set(NEEDS) - of_others
    assert config.mltfr.consensus.weight == 0.01


def test_training_on_all_but_the_last_item(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path,
        published__train_on_validation=True,
        published__pick_on_test=True,
        data__max_len=20,
    )
    stream: TrainStream = train_stream(config, BatchLayout(0, 1, 32, 32))
    manifest = load_manifest(config.data.path)
    expected = set()
    for info in manifest.splits["valid"].shards:  # a history and its validation target
        sequences = read_shard(config.data.path, info, num_items=manifest.num_items)
        expected |= {tuple(sequences[i].tolist()) for i in range(len(sequences))}
    result = set()
    for step in stream.epoch(0):
        (batch,) = step.micro_batches
        for inputs, targets in zip(batch.item_ids.numpy(), batch.target_ids.numpy(), strict=True):
            length = int((targets != 0).sum())
            if length:
                result.add((*inputs[:length].tolist(), int(targets[length - 1])))
    assert result == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"published__train_on_validation": True}, "needs published.pick_on_test=true"),
        ({"evaluation__select_by": "NDCG@7"}, "add it there"),
        ({"evaluation__select_by": "ERR@10"}, "select_by"),
    ],
)
def test_what_cannot_go_together(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_config(tmp_path, **changes)


def test_the_consensus_expert_without_dropout() -> None:
    tables = [torch.randn(20, 6)]
    for has_dropout in (True, False):
        published = PublishedConfig(consensus_without_dropout=not has_dropout)
        torch.manual_seed(0)
        mltfr = new_mltfr(MLTFRConfig(tables=("a",)), 8, tables, published).train()
        mltfr.add_consensus()
        assert mltfr.consensus is not None
        dropped = (mltfr.consensus.attention_dropout, mltfr.consensus.output_dropout)
        assert [module.p > 0 for module in dropped] == [has_dropout] * 2
        core = mltfr.cores[0]
        assert core.output_dropout.p > 0  # the experts keep theirs


def test_a_block_of_the_first_sasrec_by_its_formula() -> None:
    torch.manual_seed(0)
    dim, heads, lengths = 8, 2, (5, 3)
    block = OriginalBlock(dim, heads, 0.4).double().eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    item_ids = torch.tensor([[1] * n + [0] * (max(lengths) - n) for n in lengths])
    packing = Packing(item_ids)
    x = torch.randn(sum(lengths), dim, dtype=torch.float64)
    output = block(x, packing).split(lengths)
    first, second = block.feed_forward[0], block.feed_forward[2]
    weights = [block.query.weight, *block.key_value.weight.split(dim)]
    biases = [block.query.bias, *block.key_value.bias.split(dim)]
    for rows, result in zip(x.split(lengths), output, strict=True):
        norm = block.attention_norm
        n = F.layer_norm(rows, (dim,), norm.weight, norm.bias, 1e-8)
        q, k, v = (
            (source @ w.T + b).view(-1, heads, dim // heads).transpose(0, 1)
            for source, w, b in zip((n, rows, rows), weights, biases, strict=True)
        )
        for t in range(len(rows)):
            scores = (q[:, t : t + 1] * k[:, : t + 1]).sum(-1) / (dim // heads) ** 0.5  # [H, t + 1]
            mixed = (scores.softmax(-1)[..., None] * v[:, : t + 1]).sum(1).flatten()
            norm = block.feed_forward_norm
            h = n[t] + mixed @ block.out.weight.T + block.out.bias
            h = F.layer_norm(h, (dim,), norm.weight, norm.bias, 1e-8)
            inner = (h @ first.weight.T + first.bias).relu()
            torch.testing.assert_close(result[t], h + inner @ second.weight.T + second.bias)


def test_the_first_sasrec_scales_its_embeddings_and_starts_as_xavier() -> None:
    torch.manual_seed(0)
    config = BackboneConfig(name="sasrec_original", hidden_dim=64, num_heads=8)
    model = OriginalSASRec(config, num_items=999, max_len=50).eval()
    items, places = torch.tensor([3, 4]), torch.tensor([0, 1])
    expected = 8 * model.item_embedding.weight[items] + model.position_embedding.weight[places]
    torch.testing.assert_close(model.embed(items, places), expected)
    bound = float(np.sqrt(6 / (1000 + 64)))
    largest = model.item_embedding.weight.abs().max().item()
    assert 0.99 * bound < largest <= bound
    assert model.item_embedding.weight[0].abs().max() == 0
    first = model.blocks[0].feed_forward[0].weight.std().item()
    assert first == pytest.approx(1 / np.sqrt(3 * 64), rel=0.1)
