"""The step as trained against a plain one: a padded square, explicit softmax, PyTorch's loss."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mltfr_dist.config import BackboneConfig, LossConfig
from mltfr_dist.data.batch import RankingBatch, SequenceBatch
from mltfr_dist.models.output import TrainingOutput
from mltfr_dist.models.packing import Packing
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.models.sasrec import SASRec
from mltfr_dist.models.transformer import SelfAttention, TransformerBlock

ITEMS, MAX_LEN, DIM, ROWS, STEPS = 90, 12, 16, 16, 200


def dealt(generator: torch.Generator) -> SequenceBatch:
    """Histories of all lengths, longest first, as the stream deals them."""
    lengths = torch.randint(1, MAX_LEN + 1, (ROWS,), generator=generator).sort(descending=True)[0]
    first = torch.randint(ITEMS, (ROWS, 1), generator=generator)
    items = (first + 7 * torch.arange(MAX_LEN + 1)) % ITEMS + 1  # there is something to learn
    present = torch.arange(MAX_LEN) < lengths[:, None]
    return SequenceBatch(items[:, :-1] * present, items[:, 1:] * present, torch.arange(ROWS))


def plain_attention(attention: SelfAttention, x: Tensor) -> Tensor:
    """[B, L, D] -> [B, L, D]; padding stands behind, so that the causal mask hides it."""
    rows, length, dim = x.shape
    heads = attention.qkv(x).view(rows, length, 3, attention.num_heads, -1)
    query, key, value = heads.permute(2, 0, 3, 1, 4)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    read: Tensor = attention.out((weights @ value).transpose(1, 2).reshape(rows, length, dim))
    return read


def plain_loss(model: SASRec, batch: SequenceBatch) -> Tensor:
    """The sum over scored positions."""
    positions = torch.arange(batch.item_ids.shape[1])
    x = model.input_norm(model.item_embedding(batch.item_ids) + model.position_embedding(positions))
    for block in model.blocks:
        assert isinstance(block, TransformerBlock)
        assert isinstance(block.attention, SelfAttention)
        x = x + plain_attention(block.attention, block.attention_norm(x))
        x = x + block.feed_forward(block.feed_forward_norm(x))
    scores = model.output_norm(x) @ model.item_embedding.weight[1:].T
    return F.cross_entropy(
        scores.flatten(0, 1), batch.target_ids.flatten() - 1, reduction="sum", ignore_index=-1
    )


def trace(model: nn.Module, loss_of: object) -> list[float]:
    """Mean losses of the steps; the same batches each time."""
    assert callable(loss_of)
    generator, losses = torch.Generator().manual_seed(1), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(STEPS):
        batch = dealt(generator)
        loss = loss_of(batch) / batch.num_targets
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_the_loss_trace_is_that_of_the_plain_step() -> None:
    torch.manual_seed(0)
    config = BackboneConfig(hidden_dim=DIM, num_layers=2, num_heads=2, dropout=0.0)
    plain = SASRec(config, ITEMS, MAX_LEN)
    fast = Recommender(copy.deepcopy(plain), None, LossConfig(), num_items=ITEMS)

    def sum_of(batch: SequenceBatch) -> Tensor:
        output = fast(batch)
        assert isinstance(output, TrainingOutput)
        return output.terms["loss"].sum

    expected = trace(plain, lambda batch: plain_loss(plain, batch))
    result = trace(fast, sum_of)
    assert expected[-1] < expected[0] - 1  # it trains
    torch.testing.assert_close(torch.tensor(result), torch.tensor(expected), rtol=1e-5, atol=0)


def test_parts_hold_every_row_once_and_little_padding() -> None:
    generator = torch.Generator().manual_seed(2)
    item_ids = dealt(generator).item_ids
    item_ids = torch.cat([item_ids, torch.zeros_like(item_ids[:3])])  # rows that fill a batch
    packing = Packing(item_ids)
    assert len(packing.groups) > 2
    packed = packing.pack(item_ids)
    assert sum(size for size, _ in packing.groups) == len(packed)
    sizes = [size for size, _ in packing.groups]
    for some, (_, block) in zip(torch.split(packed, sizes), packing.groups, strict=True):
        assert torch.equal(block.unpack(some), block.item_ids)
        assert torch.equal(block.pack(block.item_ids), some)
        assert int(block.num_items.min()) >= 0.75 * block.item_ids.shape[1]


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_ranking_takes_histories_of_any_order_in_parts(num_layers: int) -> None:
    """And in the last layer last positions alone, where there are others before it."""
    torch.manual_seed(0)
    config = BackboneConfig(hidden_dim=DIM, num_layers=num_layers, num_heads=2)
    model = Recommender(SASRec(config, ITEMS, MAX_LEN), None, LossConfig(), num_items=ITEMS).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    attention, num_groups = model.backbone.blocks[0].attention, []
    assert isinstance(attention, SelfAttention)
    attention.register_forward_pre_hook(lambda _, given: num_groups.append(len(given[1].groups)))
    generator = torch.Generator().manual_seed(3)
    item_ids = dealt(generator).item_ids[torch.randperm(ROWS, generator=generator)]
    item_ids[5] = 0  # a row that fills the batch
    none = torch.zeros(0, dtype=torch.int64)
    batch = RankingBatch(item_ids, torch.ones(ROWS, dtype=torch.int64), none, none)
    with torch.no_grad():
        result = model(batch, read=lambda states, _: states)
        hidden, packing, _ = model.hidden(item_ids)
    assert num_groups[0] > 2
    assert num_groups[1] == 1
    torch.testing.assert_close(result, packing.last(hidden), rtol=1e-4, atol=1e-5)
    rounded = model.bfloat16()(batch, read=lambda states, _: states)
    torch.testing.assert_close(rounded.float(), result, rtol=0.1, atol=0.1)


def test_rows_in_another_order_are_one_part() -> None:
    assert len(Packing(torch.tensor([[1, 0, 0], [1, 2, 3]])).groups) == 1
    assert len(Packing(torch.zeros(2, 3, dtype=torch.int64)).groups) == 1
