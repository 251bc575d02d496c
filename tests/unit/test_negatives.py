"""Negatives: outside the history, a function of their keys, uniform."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mltfr_dist.data.stream.negatives import hash_u64, sample_negatives
from mltfr_dist.errors import DataError
from mltfr_dist.published.negatives import OutsideInputs


def sample(
    histories: list[list[int]], ids: list[int], length: int = 6, count: int = 3, **keys: Any
) -> np.ndarray:
    arrays = [np.array(h, dtype=np.uint16) for h in histories]
    keys = {"num_items": 30, "seed": 5, "epoch": 2} | keys
    return sample_negatives(arrays, np.array(ids, dtype=np.int64), length, count, **keys)


HISTORIES = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=20), min_size=1, max_size=6)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(HISTORIES)
def test_a_negative_is_an_item_and_never_of_the_users_history(histories: list[list[int]]) -> None:
    drawn = sample(histories, list(range(len(histories))))
    assert drawn.shape == (len(histories), 6, 3)
    assert drawn.min() >= 1
    assert drawn.max() <= 30
    for history, row in zip(histories, drawn, strict=True):
        assert not set(history) & set(row.ravel().tolist())


@settings(max_examples=30, deadline=None, derandomize=True)
@given(HISTORIES, st.randoms(use_true_random=False))
def test_a_samples_negatives_do_not_depend_on_its_batch(
    histories: list[list[int]], random: object
) -> None:
    ids = [100 + 7 * i for i in range(len(histories))]
    together = sample(histories, ids)
    order = list(range(len(histories)))
    random.shuffle(order)
    shuffled = sample([histories[i] for i in order], [ids[i] for i in order])
    for place, i in enumerate(order):
        assert np.array_equal(shuffled[place], together[i])
        assert np.array_equal(sample([histories[i]], [ids[i]])[0], together[i])


def test_a_longer_batch_draws_the_same_at_the_positions_they_share() -> None:
    assert np.array_equal(sample([[1, 2]], [9], length=9)[:, :6], sample([[1, 2]], [9], length=6))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=6), min_size=1, max_size=6))
def test_published_negatives_are_outside_the_inputs_and_differ(inputs: list[list[int]]) -> None:
    ids = [3 * i for i in range(len(inputs))]
    drawn = sample(inputs, ids, rule=OutsideInputs())
    for items, row in zip(inputs, drawn, strict=True):
        real = row[: len(items)].ravel().tolist()
        assert not {0, *items} & set(real)
        assert len(set(real)) == len(real) == 3 * len(items)
        assert (row[len(items) :] == 0).all()
    for i, items in enumerate(inputs):  # alone, and beside a longer sample
        alone = sample([items], [ids[i]], length=9, rule=OutsideInputs())[0]
        assert np.array_equal(alone[:6], drawn[i])


def test_published_negatives_hold_the_target_where_nothing_else_is_left() -> None:
    drawn = sample([[1, 2, 3]], [0], length=3, count=1, num_items=6, rule=OutsideInputs())
    assert sorted(drawn.ravel().tolist()) == [4, 5, 6]
    with pytest.raises(DataError, match="history of 3 of 5 items") as caught:
        sample([[1, 2, 3]], [0], length=3, count=1, num_items=5, rule=OutsideInputs())
    assert "the inputs of a sample" in caught.value.rule


@pytest.mark.parametrize("change", [{"seed": 6}, {"epoch": 3}])
def test_seed_and_epoch_give_other_negatives(change: dict[str, int]) -> None:
    assert not np.array_equal(
        sample([[1]], [0], length=20), sample([[1]], [0], length=20, **change)
    )


def test_samples_and_positions_draw_apart() -> None:
    drawn = sample([[1], [1]], [0, 1], length=50, num_items=10_000)
    assert np.mean(drawn[0] == drawn[1]) < 0.05
    assert len(np.unique(drawn[0])) > 140  # of 150 draws


def test_negatives_are_uniform_over_what_is_left() -> None:
    history = [1, 2, 10]
    counts = np.bincount(
        sample([history], [3], length=4000, count=5, num_items=20).ravel(), minlength=21
    )
    left = [i for i in range(1, 21) if i not in history]
    expected = 20_000 / len(left)
    chi_square = float(((counts[left] - expected) ** 2 / expected).sum())
    assert counts.sum() == counts[left].sum()
    assert chi_square < 40  # 16 degrees of freedom: the 99.9 % point is 39.3


def test_the_only_item_left_is_found() -> None:
    assert set(sample([[1, 2, 4, 5]], [0], num_items=5).ravel()) == {3}


def test_a_crowded_history_is_a_data_error_that_names_its_size() -> None:
    with pytest.raises(DataError, match="history of 5 of 5 items") as caught:
        sample([[1], [5, 4, 3, 2, 1]], [0, 1], num_items=5)
    assert "outside the user's history" in caught.value.rule
    assert "--item-core" in caught.value.remedy


def test_hash_words_are_spread() -> None:
    words = hash_u64(0, np.arange(20_000, dtype=np.uint64))
    assert len(np.unique(words)) == 20_000
    ones = np.unpackbits(words.view(np.uint8)).reshape(20_000, 64).mean(0)
    assert np.abs(ones - 0.5).max() < 0.02
    assert hash_u64(1, 2) != hash_u64(2, 1)
