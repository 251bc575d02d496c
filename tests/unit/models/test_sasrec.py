"""SASRec: causal, blind to padding and to the other rows of a batch."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mltfr_dist.config import BackboneConfig, LossConfig
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.models.sasrec import SASRec

NUM_ITEMS, MAX_LEN, DIM = 30, 10, 16
HISTORY = st.lists(st.integers(1, NUM_ITEMS), min_size=1, max_size=MAX_LEN)
few = settings(max_examples=20, deadline=None, derandomize=True)


@cache
def model(dtype: torch.dtype = torch.float32) -> SASRec:
    """Larger weights than a fresh model's, so that what should not leak would be seen."""
    torch.manual_seed(0)
    made = SASRec(
        BackboneConfig(hidden_dim=DIM, num_layers=2, num_heads=2, dropout=0.3), NUM_ITEMS, MAX_LEN
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        made.item_embedding.weight[0] = 0
    return made.to(dtype).eval()


def padded(histories: list[list[int]], width: int = 0) -> torch.Tensor:
    width = max(width, *(len(h) for h in histories))
    return torch.tensor([h + [0] * (width - len(h)) for h in histories])


def padded_output(made: SASRec, item_ids: torch.Tensor) -> torch.Tensor:
    """Hidden states [B, L, D], zero at padding."""
    whole = Recommender(made, None, LossConfig(), num_items=NUM_ITEMS)
    hidden, packing, _ = whole.hidden(item_ids)
    return packing.unpack(hidden)


PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 5e-6)]
)


@PRECISIONS
@few
@given(history=HISTORY, data=st.data())
def test_a_later_item_changes_no_earlier_position(
    dtype: torch.dtype, tolerance: float, history: list[int], data: st.DataObject
) -> None:
    place = data.draw(st.integers(0, len(history) - 1))
    other = history.copy()
    other[place] = history[place] % NUM_ITEMS + 1
    with torch.no_grad():
        before, after = (
            padded_output(model(dtype), padded([history]))[0],
            padded_output(model(dtype), padded([other]))[0],
        )
    torch.testing.assert_close(after[:place], before[:place], rtol=0, atol=tolerance)
    assert (after[place:] - before[place:]).abs().amax(
        1
    ).min() > 1e-4  # and every later one sees it


@PRECISIONS
@few
@given(histories=st.lists(HISTORY, min_size=1, max_size=5), width=st.integers(0, MAX_LEN))
def test_padding_and_other_rows_change_nothing(
    dtype: torch.dtype, tolerance: float, histories: list[list[int]], width: int
) -> None:
    with torch.no_grad():
        together = padded_output(model(dtype), padded([*histories, []], width))
        for row, history in zip(together, histories):
            alone = padded_output(model(dtype), padded([history]))[0]
            torch.testing.assert_close(row[: len(history)], alone, rtol=0, atol=tolerance)
            assert row[len(history) :].abs().sum() == 0
        assert together[-1].abs().sum() == 0


def test_shapes_and_embeddings() -> None:
    item_ids = padded([[1, 2, 3], [4]])
    assert padded_output(model(), item_ids).shape == (2, 3, DIM)
    assert padded_output(model(), item_ids[:, :1]).shape == (2, 1, DIM)
    embedded, packing = model().inputs(item_ids)
    assert embedded.shape == (4, DIM)
    assert packing.unpack(embedded)[1, 1:].abs().sum() == 0
    assert padded_output(model(), torch.zeros(0, 4, dtype=torch.int64)).shape == (0, 4, DIM)


def test_a_fresh_model_has_a_zero_padding_vector_that_gets_no_gradient() -> None:
    fresh = SASRec(BackboneConfig(hidden_dim=DIM), NUM_ITEMS, MAX_LEN)
    assert fresh.item_embedding.weight[0].abs().sum() == 0
    padded_output(fresh, padded([[1, 2], [3]])).sum().backward()
    assert fresh.item_embedding.weight.grad[0].abs().sum() == 0


def test_positions_and_order_matter() -> None:
    with torch.no_grad():
        one, other = (padded_output(model(), padded([h]))[0, -1] for h in ([1, 2, 3], [2, 1, 3]))
    assert (one - other).abs().max() > 1e-3


def test_dropout_acts_in_training_only() -> None:
    item_ids = padded([[1, 2, 3]])
    fresh = SASRec(BackboneConfig(hidden_dim=DIM, dropout=0.5), NUM_ITEMS, MAX_LEN)
    assert not torch.equal(padded_output(fresh, item_ids), padded_output(fresh, item_ids))
    fresh.eval()
    assert torch.equal(padded_output(fresh, item_ids), padded_output(fresh, item_ids))


@pytest.mark.parametrize("num_layers", [1, 3])
def test_layers_and_sizes_follow_the_configuration(num_layers: int) -> None:
    made = SASRec(BackboneConfig(hidden_dim=8, num_layers=num_layers, num_heads=4), 5, 7)
    assert len(made.blocks) == num_layers
    assert made.item_embedding.weight.shape == (6, 8)
    assert made.position_embedding.weight.shape == (7, 8)
