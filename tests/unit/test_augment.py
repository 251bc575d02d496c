"""Masks, views and shared negatives: what they are, and that they follow from their keys alone."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mltfr_dist.data.stream.augment import Draws, ViewRatios, augmented_views, cloze_mask
from mltfr_dist.data.stream.negatives import log_probability, sample_shared

MASK = 51
HISTORIES = st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=12), min_size=1, max_size=6)
some = settings(max_examples=30, deadline=None, derandomize=True)
HALF = ViewRatios(0.5, 0.5, 0.5)


def draws(ids: list[int], seed: int = 1, epoch: int = 0) -> Draws:
    return Draws(seed, epoch, np.array(ids, dtype=np.int64))


def padded(histories: list[list[int]], width: int = 0) -> np.ndarray:
    width = max([width, 1, *map(len, histories)])
    return np.array([h + [0] * (width - len(h)) for h in histories], dtype=np.int64)


def views(
    histories: list[list[int]],
    ids: list[int],
    ratios: ViewRatios = HALF,
    width: int = 0,
    **keys: int,
) -> np.ndarray:
    return augmented_views(draws(ids, **keys), padded(histories, width), ratios, MASK)


# --- cloze
# ------------------------------------------------------------


@some
@given(st.lists(st.integers(1, 15), min_size=1, max_size=8), st.floats(0.01, 1))
def test_a_mask_lies_on_real_positions_and_there_is_always_one(
    lengths: list[int], ratio: float
) -> None:
    sizes = np.array(lengths)
    mask = cloze_mask(draws(list(range(len(lengths)))), sizes, 15, ratio)
    assert mask.shape == (len(lengths), 15)
    assert not (mask & (np.arange(15) >= sizes[:, None])).any()
    assert mask.any(axis=1).all()


@some
@given(st.lists(st.integers(1, 15), min_size=1, max_size=8))
def test_a_mask_does_not_depend_on_its_batch(lengths: list[int]) -> None:
    ids = [40 + 3 * i for i in range(len(lengths))]
    together = cloze_mask(draws(ids), np.array(lengths), 20, 0.3)
    for row, sample, length in zip(together, ids, lengths, strict=True):
        assert np.array_equal(
            cloze_mask(draws([sample]), np.array([length]), length, 0.3)[0], row[:length]
        )


def test_masks_have_their_share_and_change_with_seed_epoch_and_sample() -> None:
    sizes = np.full(400, 50)
    mask = cloze_mask(draws(list(range(400))), sizes, 50, 0.2)
    assert mask.mean() == pytest.approx(0.2, abs=0.01)
    assert cloze_mask(draws([0]), sizes[:1], 50, 1.0).all()
    last = cloze_mask(draws(list(range(400))), sizes, 50, 1e-9)
    assert last[:, -1].all()
    assert last.sum() == 400  # where none is drawn, the last alone
    for other in (
        draws(list(range(400)), seed=2),
        draws(list(range(400)), epoch=1),
        draws(list(range(400, 800))),
    ):
        assert (cloze_mask(other, sizes, 50, 0.2) == mask).mean() < 0.8


# --- views
# ------------------------------------------------------------


@some
@given(HISTORIES)
def test_a_view_is_a_crop_a_masking_or_a_reordering(histories: list[list[int]]) -> None:
    for history, pair in zip(histories, views(histories, list(range(len(histories)))), strict=True):
        half = len(history) // 2
        for row in pair.tolist():
            view = [i for i in row if i]
            assert row[: len(view)] == view  # padding stands behind
            crops = [history[s : s + max(1, half)] for s in range(len(history))]
            masked = len(view) == len(history) and all(
                a in (b, MASK) for a, b in zip(view, history, strict=True)
            )
            assert (
                view in crops
                or (masked and view.count(MASK) in (0, half))
                or sorted(view) == sorted(history)
            )


@some
@given(HISTORIES, st.integers(0, 20))
def test_views_do_not_depend_on_their_batch_or_its_width(
    histories: list[list[int]], width: int
) -> None:
    ids = [9 + 2 * i for i in range(len(histories))]
    together = views(histories, ids, width=width)
    for pair, history, sample in zip(together, histories, ids, strict=True):
        alone = views([history], [sample])[0]
        assert np.array_equal(pair[:, : len(history)], alone)
        assert not pair[:, len(history) :].any()


def test_all_three_kinds_occur_and_both_views_differ() -> None:
    history = list(range(1, 21))
    result = views([history] * 300, list(range(300)))
    cropped = (result != 0).sum(-1) == 10
    masked = (result == MASK).sum(-1) == 10
    reordered = (np.sort(result, axis=-1) == np.array(history)).all(-1)
    assert (cropped.astype(int) + masked + reordered == 1).all()
    for kind in (cropped, masked, reordered):
        assert kind.mean() == pytest.approx(1 / 3, abs=0.06)
    moved = (result != np.array(history)).sum(-1)[reordered]
    assert moved.max() <= 10  # outside the window nothing moves
    assert moved.mean() > 5
    assert (result[:, 0] != result[:, 1]).any(axis=1).mean() > 0.95
    assert (views([history], [0], epoch=1) != result[0]).any()
    assert (views([history], [0], seed=2) != result[0]).any()


@pytest.mark.parametrize("field", ["crop", "mask", "reorder"])
def test_each_ratio_has_an_effect(field: str) -> None:
    history = [list(range(1, 21))] * 30
    assert not np.array_equal(
        views(history, list(range(30))),
        views(history, list(range(30)), HALF._replace(**{field: 0.9})),
    )


def test_an_empty_row_stays_empty() -> None:
    assert not views([[], [1, 2]], [-1, 0])[0].any()


# --- shared negatives
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proposal", ["uniform", "log_uniform"])
def test_shared_negatives_follow_their_stated_probabilities(proposal: str) -> None:
    keys = {"num_items": 20, "seed": 3, "epoch": 1, "step": 5}
    everything = np.arange(1, 21)
    probabilities = np.exp(log_probability(everything, proposal, 20))
    assert probabilities.sum() == pytest.approx(1)
    ids, logarithms = sample_shared(40_000, proposal, **keys)
    assert np.array_equal(logarithms, log_probability(ids, proposal, 20))
    assert ids.min() == 1
    assert ids.max() == 20
    expected = 40_000 * probabilities
    chi_square = (((np.bincount(ids, minlength=21)[1:] - expected) ** 2) / expected).sum()
    assert chi_square < 44  # 19 degrees of freedom: the 99.9 % point is 43.8
    for change in ({"seed": 4}, {"epoch": 2}, {"step": 6}):
        assert not np.array_equal(sample_shared(50, proposal, **keys | change)[0], ids[:50])
    assert np.array_equal(sample_shared(50, proposal, **keys)[0], ids[:50])


def test_log_uniform_prefers_popular_items() -> None:
    probabilities = log_probability(np.arange(1, 101), "log_uniform", 100)
    assert (np.diff(probabilities) < 0).all()
    assert np.exp(probabilities[0] - probabilities[9]) == pytest.approx(np.log(2) / np.log(1.1))
