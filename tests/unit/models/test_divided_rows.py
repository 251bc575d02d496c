"""Rows that are looked up before they are read: values, gradients, and what was not looked up."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mltfr_dist.models.divided_rows import DividedRows, Division, division_of, own_vectors
from mltfr_dist.models.initial import ItemEmbedding, undrawn_items


class Backwards(Division):
    """One process that holds all of 9 rows, the last first."""

    own_ids = torch.arange(8, -1, -1)

    def positions(self, item_ids: Tensor) -> Tensor:
        return 8 - item_ids

    def fetch(self, own: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
        return own[positions].to(dtype)


def made() -> tuple[DividedRows, ItemEmbedding]:
    embedding = ItemEmbedding(9, 4)
    return DividedRows(embedding, Backwards()), embedding


def test_lookups_give_the_rows_and_one_leaf_has_their_gradients() -> None:
    rows, plain = made()
    first, second = torch.tensor([[3, 0], [3, 8]]), torch.tensor([8, 2])
    rows.look_up(torch.cat([first.flatten(), second]))
    assert rows(first).equal(plain(first))
    assert rows(second).equal(plain(second))
    for table in (rows, plain):
        ((table(first) ** 2).sum() + (table(second) ** 3).sum()).backward()
    ((positions, gradients),) = rows.take_gradients()
    assert positions.tolist() == [0, 5, 6, 8]
    items = 8 - positions
    assert items.tolist()[-1] == 0, "padding: who steps the rows leaves it out"
    assert plain.weight.grad is not None
    torch.testing.assert_close(gradients[:-1], plain.weight.grad[items[:-1]])
    assert rows.take_gradients() == []


def test_own_vectors_are_a_leaf_in_training_alone() -> None:
    rows, plain = made()
    assert own_vectors(rows).equal(plain.weight[rows.division.own_ids])
    (2 * rows.own_vectors()).sum().backward()
    (gradient,) = rows.take_own_gradients()
    assert gradient.equal(torch.full((9, 4), 2.0))
    rows.eval()
    assert not rows.own_vectors().requires_grad
    rows.look_up(torch.tensor([1]))
    assert not rows(torch.tensor([1])).requires_grad


def test_what_was_not_looked_up_is_not_read() -> None:
    rows, _ = made()
    with pytest.raises(RuntimeError, match="before `look_up`"):
        rows(torch.tensor([1]))
    rows.look_up(torch.tensor([1, 3]))
    with pytest.raises(RuntimeError, match="was not given"):
        rows(torch.tensor([2]))


def test_a_whole_table_is_loaded_in_this_process_s_order_and_rows_are_no_state() -> None:
    rows, plain = made()
    assert rows.state_dict() == {}
    whole = torch.randn(9, 4)
    rows.load_state_dict({"weight": whole})
    assert rows.weight.equal(whole.flip(0))
    assert division_of(nn.Sequential(rows)) is rows.division
    assert division_of(plain) is None


def test_a_process_draws_its_rows_alone() -> None:
    torch.manual_seed(3)
    whole, after = ItemEmbedding(9, 4), torch.get_rng_state()
    torch.manual_seed(3)
    with undrawn_items():
        left = ItemEmbedding(9, 4)
    assert torch.equal(torch.get_rng_state(), after), "what is drawn next is the same"
    left.weight.data.fill_(7.0)
    assert DividedRows(left, Backwards()).weight.equal(whole.weight.detach().flip(0))
