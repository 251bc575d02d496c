"""What a GPU does so that nobody waits for it gives what a CPU gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_at_once import made, step
from torch import Tensor
from torch.nn import functional as F

from mltfr_dist.config import FilterConfig
from mltfr_dist.models import search as searching
from mltfr_dist.models.draws import GumbelNoise
from mltfr_dist.models.search import nearest_rows, search_rows
from mltfr_dist.models.selectors import others, user_guided
from mltfr_dist.models.selectors.base import those_kept
from mltfr_dist.numerics import distinct_in_room, is_fast_in_float64


def unit(rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return F.normalize(rows.to(dtype), dim=-1)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that scores everything in float64."""
    monkeypatch.setattr(searching, "is_fast_in_float64", lambda device: True)


def test_a_cpu_is_asked_which_rows_are_near() -> None:
    assert not is_fast_in_float64(torch.device("cpu"))


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize(("queries", "rows", "kept"), [(9, 700, 5), (0, 30, 4), (4, 6, 9)])
def test_all_in_float64_finds_the_same_rows(
    queries: int, rows: int, kept: int, noisy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Near-ties and equal rows among them, in any chunks."""
    torch.manual_seed(0)
    table = torch.randn(rows, 8)
    table[rows // 2 :] = table[: rows - rows // 2]
    table[::5] = table[1] * (1 + 1e-7 * torch.arange(len(table[::5])))[:, None]
    query = table[torch.randint(rows, (queries,))] + 0.1
    noise = None
    if noisy:
        noise = GumbelNoise(torch.randint(1 << 62, (queries,)), torch.arange(rows), 0.5)
    expected = search_rows(query, table, unit, kept, noise)
    with monkeypatch.context() as patched:
        patched.setattr(searching, "is_fast_in_float64", lambda device: True)
        for elements in (1, 2000, searching.CACHED_ELEMENTS):
            patched.setattr(searching, "CACHED_ELEMENTS", elements)
            scores, ids = search_rows(query, table, unit, kept, noise)
            assert torch.equal(ids, expected[1])
            assert torch.equal(scores, expected[0])
            assert torch.equal(nearest_rows(query, table, unit, kept, noise), expected[1])


@given(st.lists(st.integers(0, 11), max_size=30), st.integers(12, 40))
def test_distinct_numbers_have_room_for_as_many_as_can_be(values: list[int], count: int) -> None:
    given_values = torch.tensor(values, dtype=torch.int64)
    distinct, indices = distinct_in_room(given_values, count)
    assert len(distinct) == min(len(values), count)
    assert torch.equal(distinct[indices], given_values)
    expected, inverse = torch.unique(given_values, return_inverse=True)
    assert torch.equal(indices, inverse)
    assert torch.equal(distinct[: len(expected)], expected)
    assert set(distinct[len(expected) :].tolist()) <= set(expected[-1:].tolist())


def test_more_choices_than_rows_have_room_for_the_rows() -> None:
    kept = torch.tensor([[2, 0], [1, 2], [0, 1]])
    distinct, indices = distinct_in_room(kept, 3)
    assert distinct.tolist() == [0, 1, 2]
    assert torch.equal(indices, kept)


@pytest.mark.parametrize("strategy", ["user_guided", "random_tokens"])
def test_a_step_over_rows_that_come_twice_is_the_same_step(
    strategy: str, fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every token searched: losses and gradients."""
    made_filter = FilterConfig(strategy=strategy, top_k=3, query_every=2, noise=0.0)
    expected = step(made(filter=made_filter, consensus=True))
    calls = []

    def in_room(kept: Tensor, count: int, *, are_at_hand: bool) -> tuple[Tensor, Tensor]:
        assert are_at_hand  # the whole table is in memory
        calls.append(len(those_kept(kept, count)[0]) < min(kept.numel(), count))
        return distinct_in_room(kept, count)

    for module in (user_guided, others):
        monkeypatch.setattr(module, "those_kept", in_room)
    found = step(made(filter=made_filter, consensus=True))
    assert len(calls) == 3
    assert any(calls)  # some rows did come twice
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_noise_knows_the_updates_of_a_state_that_is_loaded() -> None:
    """The number of updates is asked for once, and anew after a state has been loaded."""
    noisy = FilterConfig(top_k=3, query_every=2, noise=0.5, noise_steps=10)
    model, other = made(filter=noisy), made(filter=noisy)
    early = step(model)
    for _ in range(4):
        model.after_update(None)
    late = step(model)
    assert not torch.equal(late["loss"], early["loss"])
    step(other)
    other.load_state_dict(model.state_dict())
    assert torch.equal(step(other)["loss"], late["loss"])
