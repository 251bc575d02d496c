"""Defects of backbones and tables, each by its definition, alone and mixed with others."""

from __future__ import annotations

import pytest
import torch
from support import new_model
from torch import Tensor

from mltfr_dist.config import BackboneConfig, FilterConfig, LossConfig, MLTFRConfig, PublishedConfig
from mltfr_dist.data.batch import RankingBatch
from mltfr_dist.models.bert4rec import BERT4Rec
from mltfr_dist.models.placed_table import ReplicatedTable
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.models.selectors.user_guided import UserGuided
from mltfr_dist.published.components import (
    published_backbone,
    published_components,
    published_table,
)
from mltfr_dist.published.filters import CircularFilter, WholeSequenceBSARec
from mltfr_dist.published.masks import AttendsToPadding, ReadsBeforeMask, Widened
from mltfr_dist.published.selecting import NoiseInEvaluation, StraightThrough
from mltfr_dist.published.tables import TrainedTable

MAX_LEN, DIM, NUM_ITEMS = 6, 8, 20
MASK = NUM_ITEMS + 1


def bert4rec(**switches: bool) -> Recommender:
    """In float64, with weights far from their start."""
    torch.manual_seed(0)
    model = new_model(
        BackboneConfig(name="bert4rec", hidden_dim=DIM),
        MLTFRConfig(tables=("a",), filter=FilterConfig(top_k=3, shortlist_size=None)),
        LossConfig(),
        num_items=NUM_ITEMS,
        max_len=MAX_LEN,
        table_rows=[torch.randn(12, 5)],
        published=PublishedConfig(**switches),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.double().eval()


def scores(model: Recommender, item_ids: Tensor) -> Tensor:
    none = torch.zeros(0).long()
    batch = RankingBatch(item_ids, torch.ones(len(item_ids)).long(), none, none)
    with torch.no_grad():
        return model(batch)[:, 1:]


def test_a_circular_filter_wraps_around_the_longest_sequence() -> None:
    torch.manual_seed(0)
    made = CircularFilter(3, MAX_LEN).double()
    for length in (2, MAX_LEN):
        x = torch.randn(2, length, 3, dtype=torch.float64)
        expected = torch.stack(
            [
                sum(made.kernel[(t - s) % MAX_LEN] * x[:, s] for s in range(length))
                for t in range(length)
            ],
            dim=1,
        )
        torch.testing.assert_close(made(x), expected)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_whole_sequences_low_pass_is_that_of_its_transform(count: int) -> None:
    backbone = WholeSequenceBSARec(
        BackboneConfig(name="bsarec", hidden_dim=DIM, bsarec={"low_frequencies": count}), 9, MAX_LEN
    )
    x = torch.randn(MAX_LEN, 4)
    spectrum = torch.fft.rfft(x, dim=0)
    spectrum[count:] = 0
    low_pass = backbone.blocks[0].filter.low_pass
    torch.testing.assert_close(low_pass @ x, torch.fft.irfft(spectrum, n=MAX_LEN, dim=0))
    assert low_pass.triu(1).abs().max() > 1e-3  # the future


@pytest.mark.parametrize("name", ["fmlp", "bsarec"])
def test_a_whole_sequence_filter_shows_the_future(name: str) -> None:
    for switch in (True, False):
        torch.manual_seed(0)
        kind = published_backbone(name, PublishedConfig(whole_sequence_filter=switch))
        model = Recommender(
            kind(BackboneConfig(name=name, hidden_dim=DIM), NUM_ITEMS, MAX_LEN),
            None,
            LossConfig(),
            num_items=NUM_ITEMS,
        ).eval()
        first, other = (model.hidden(torch.tensor([[1, 2, 3, last]]))[0] for last in (4, 9))
        assert ((first[:3] - other[:3]).abs().max() > 1e-4) == switch


def test_padding_that_acts_as_items_is_what_padding_items_would_be() -> None:
    """A history is read as the same one with so many items of id 0 behind it, wherever it
    stands.
    """
    model, plain = bert4rec(attending_padding=True), bert4rec()
    short = torch.tensor([[3, 1, 4]])
    assert (scores(model, short) - scores(plain, short)).abs().max() > 1e-3
    beside = torch.tensor([[3, 1, 4, 0, 0, 0], [5, 2, 6, 5, 3, 5]])
    torch.testing.assert_close(scores(model, beside)[:1], scores(model, short))
    full = beside[1:]  # with its mask as long as can be: nothing is padded
    torch.testing.assert_close(scores(model, full), scores(plain, full))
    hidden, layout, routing = model.hidden(torch.tensor([[3, 1, MASK]]))
    assert hidden.shape == (MAX_LEN + 1, DIM)
    assert layout.num_items.tolist() == [3]
    assert routing is not None
    assert len(routing.gate) == MAX_LEN + 1  # MLTFR adds to padding


def test_targets_and_weights_are_widened_with_their_history() -> None:
    layout = Widened(torch.tensor([[3, 1, 0], [5, 0, 0]]), 5)
    packed = layout.pack(torch.tensor([[7, 8, 0], [9, 0, 0]]))
    assert packed.tolist() == [7, 8, 0, 0, 0, 9, 0, 0, 0, 0]
    assert layout.last(packed).tolist() == [8, 9]
    assert layout.columns.tolist() == [*range(5)] * 2


def test_a_short_history_is_read_before_its_mask() -> None:
    before, plain = bert4rec(read_before_mask=True), bert4rec()
    for history, moved in (([3, 1, 4], True), ([5, 2, 6, 5, 3, 5], False)):
        item_ids = torch.tensor([history])
        hidden, layout, _ = plain.hidden(plain.backbone.for_ranking(item_ids))
        place = len(history) - 1 if moved else len(history)
        expected = layout.unpack(hidden)[:, place] @ plain.backbone.item_embedding.weight[1:-1].T
        torch.testing.assert_close(scores(before, item_ids), expected)


def test_defects_are_mixed_into_one_class_and_keep_the_names_of_weights() -> None:
    both = bert4rec(attending_padding=True, read_before_mask=True)
    kind = type(both.backbone)
    assert issubclass(kind, AttendsToPadding)
    assert issubclass(kind, ReadsBeforeMask)
    assert kind.__name__ == "BERT4Rec"
    assert both.state_dict().keys() == bert4rec().state_dict().keys()
    assert published_backbone("bert4rec", PublishedConfig()) is BERT4Rec
    blocks = published_components(
        MLTFRConfig(tables=("a",)),
        PublishedConfig(noise_in_evaluation=True, straight_through=True),
    )
    assert blocks.selector is not None
    assert issubclass(blocks.selector, StraightThrough)
    assert blocks.selector.draws_noise is NoiseInEvaluation.draws_noise
    assert not issubclass(UserGuided, StraightThrough)


def test_trained_tables_are_copies_with_a_gradient() -> None:
    rows = torch.randn(5, 3)
    table = published_table(PublishedConfig(trained_tables=True))(rows)
    assert isinstance(table, TrainedTable)
    table.take(torch.tensor([1, 3])).sum().backward()
    assert table.rows.grad is not None
    assert table.rows.grad.sum(1).tolist() == [0, 3, 0, 3, 0]
    with torch.no_grad():
        table.rows.zero_()
    assert rows.abs().min() > 0
    assert list(table.state_dict()) == ["rows"]
    assert isinstance(published_table(PublishedConfig())(rows), ReplicatedTable)
