"""The kernels that rank against scores as they are defined, and against the path without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mltfr_dist.models.kernels import build, ranking
from mltfr_dist.models.rank_counts import LogNormaliser, count_better
from mltfr_dist.models.tiles import Pairs, exact_scores
from mltfr_dist.models.top_items import top_items

pytestmark = pytest.mark.skipif(
    build.library() is None, reason="no C++ compiler or no AVX2: there are no kernels to test"
)
many = settings(max_examples=120, deadline=None, derandomize=True)

KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "spread": lambda v: v,
    "equal": lambda v: v[torch.randint(max(1, len(v) // 5), (len(v),))],
    "near-ties": lambda v: v[:1] * (1 + torch.randint(-2, 3, (len(v), 1)) * 2.0**-23),
    "whole numbers": lambda v: v.round(),
    "zeros": torch.zeros_like,
    "large": lambda v: v * 1e17,
    "underflowing": lambda v: v * 1e-22,
    "of all sizes": lambda v: v * 10.0 ** torch.randint(-12, 8, (len(v), 1)),
    "cancelling": lambda v: v.sign() * 2.0 ** (29 * torch.randint(3, v.shape[1:])),  # order decides
    "negative": lambda v: -v.abs(),
}


@contextmanager
def plain() -> Iterator[None]:
    """The path without kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "library", lambda: None)
        yield


@contextmanager
def kernels(threads: int) -> Iterator[None]:
    """With kernels for any number of users, and no tile of scores beside."""

    def no_product(*args: object, **kwargs: object) -> None:
        raise AssertionError("a tile of scores was formed")

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "MIN_USERS", 1)
        patch.setattr(torch, "mm", no_product)
        try:
            yield
        finally:
            torch.set_num_threads(before)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, Pairs]:
    """States, vectors, targets, and pairs that do not count: some twice, some of no item."""
    torch.manual_seed(draw(st.integers(0, 2**31)))
    users, items, dim = (draw(st.integers(1, most)) for most in (15, 130, 35))
    hidden, vectors = torch.randn(users, dim), torch.randn(items, dim)
    kinds = st.sampled_from(sorted(KINDS))
    hidden, vectors = KINDS[draw(kinds)](hidden), KINDS[draw(kinds)](vectors)
    targets = torch.randint(1, items + 1, (users,))
    seen = draw(st.integers(0, 2 * items))
    rows, item_ids = torch.randint(users, (seen,)), torch.randint(0, items + 3, (seen,))
    everyone = torch.arange(users)
    exclude = Pairs(torch.cat([rows, everyone, rows]), torch.cat([item_ids, targets, item_ids]))
    return hidden, vectors, targets, exclude


def defined_scores(hidden: Tensor, vectors: Tensor, exclude: Pairs) -> Tensor:
    """[B, I], of what is left out -inf."""
    scores = exact_scores(hidden[:, None], vectors)
    here = (exclude.item_ids > 0) & (exclude.item_ids <= len(vectors))
    scores[exclude.rows[here], exclude.item_ids[here] - 1] = -torch.inf
    return scores


@many
@given(cases(), st.sampled_from([1, 3]), st.sampled_from([None, (4, 1), (6, 16), (5, 37)]))
def test_counts(
    case: tuple[Tensor, Tensor, Tensor, Pairs], threads: int, tile: tuple[int, int] | None
) -> None:
    hidden, vectors, targets, exclude = case
    target_scores = exact_scores(hidden, vectors[targets - 1])
    with kernels(threads):
        result = count_better(hidden, vectors, target_scores, exclude=exclude, tile=tile)
        beside = count_better(
            hidden,
            vectors,
            target_scores,
            exclude=exclude,
            tile=tile,
            normaliser=LogNormaliser(hidden),
        )
    assert all(map(torch.equal, beside, result))
    with plain():
        without = count_better(hidden, vectors, target_scores, exclude=exclude)
    scores = defined_scores(hidden, vectors, exclude)
    for counted, other, expected in zip(
        result,
        without,
        ((scores > target_scores[:, None]).sum(1), (scores == target_scores[:, None]).sum(1)),
        strict=True,
    ):
        assert torch.equal(counted, expected)
        assert torch.equal(other, expected)


def away_from_true(normaliser: LogNormaliser, hidden: Tensor, vectors: Tensor) -> Tensor:
    """[B] how far it is off, in what its scores may err by in fp32, and beyond 1e-6."""
    whole = (hidden.double() @ vectors.double().T).logsumexp(1)
    sizes = hidden.double().norm(dim=1) * vectors.double().norm(dim=1).amax()
    return (normaliser.value - whole).abs() / (1e-6 + (hidden.shape[1] + 16) * 2.0**-24 * sizes)


@many
@given(cases(), st.sampled_from([1, 3]), st.sampled_from([None, (4, 1), (6, 16), (5, 37), (9, 64)]))
def test_the_normaliser_of_every_score(
    case: tuple[Tensor, Tensor, Tensor, Pairs], threads: int, tile: tuple[int, int] | None
) -> None:
    """Whatever is left out, and where the first items' scores come from a path without kernels."""
    hidden, vectors, targets, exclude = case
    target_scores = exact_scores(hidden, vectors[targets - 1])
    normaliser, after_others = LogNormaliser(hidden), LogNormaliser(hidden)
    first = vectors[: len(vectors) // 3]
    with plain():
        count_better(hidden, first, target_scores, normaliser=after_others)
    with kernels(threads):
        count_better(
            hidden, vectors, target_scores, exclude=exclude, normaliser=normaliser, tile=tile
        )
        further = vectors[len(first) :]
        count_better(hidden, further, target_scores, normaliser=after_others, tile=tile)
    assert (away_from_true(normaliser, hidden, vectors) <= 1).all()
    assert (away_from_true(after_others, hidden, vectors) <= 1).all()


@pytest.mark.parametrize("steps", [[0.0], [0, 30, 39, 41], [0, 60, 900], [900, 0], [-900, -800]])
def test_the_normaliser_of_scores_that_rise(steps: list[float]) -> None:
    """By less and by more than exponentials of one shift can hold."""
    torch.manual_seed(0)
    hidden = torch.cat([torch.ones(40, 1), torch.randn(40, 3)], dim=1)
    levels = torch.tensor(steps).repeat_interleave(3000)[:, None]
    vectors = torch.cat([levels, torch.randn(len(levels), 3)], dim=1)
    normaliser = LogNormaliser(hidden)
    with kernels(2):
        count_better(hidden, vectors, torch.zeros(40), normaliser=normaliser)
    assert (away_from_true(normaliser, hidden, vectors) <= 1).all()


@many
@given(
    cases(),
    st.integers(1, 140),
    st.sampled_from([1, 3]),
    st.sampled_from([None, (4, 1), (6, 16), (5, 37)]),
)
def test_best_items(
    case: tuple[Tensor, Tensor, Tensor, Pairs], k: int, threads: int, tile: tuple[int, int] | None
) -> None:
    hidden, vectors, _, exclude = case
    with kernels(threads):
        values, ids = top_items(hidden, vectors, k, exclude=exclude, tile=tile)
    with plain():
        without = top_items(hidden, vectors, k, exclude=exclude)
    scores = defined_scores(hidden, vectors, exclude)
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    expected = scores.gather(1, order)
    there = min(k, len(vectors))
    assert torch.equal(values[:, :there], expected)
    assert torch.equal(ids[:, :there], torch.where(expected > -torch.inf, order + 1, 0))
    assert values[:, there:].isneginf().all()
    assert not ids[:, there:].any()
    assert torch.equal(values, without[0])
    assert torch.equal(ids, without[1])


@pytest.mark.parametrize("kind", ["spread", "equal", "near-ties"])
def test_of_more_items_than_are_put_into_order_together(kind: str) -> None:
    """Several parts, each of several runs of panels, and more candidates than are kept."""
    torch.manual_seed(0)
    hidden, vectors = torch.randn(20, 300), KINDS[kind](torch.randn(4000, 300))
    exclude = Pairs(torch.randint(20, (900,)), torch.randint(1, 4001, (900,)))
    target_scores = exact_scores(hidden, vectors[:20])
    scores = defined_scores(hidden, vectors, exclude)
    with kernels(2):
        result = count_better(hidden, vectors, target_scores, exclude=exclude)
        values, ids = top_items(hidden, vectors, 12, exclude=exclude)
    assert torch.equal(result.better, (scores > target_scores[:, None]).sum(1))
    assert torch.equal(result.equal, (scores == target_scores[:, None]).sum(1))
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :12]
    assert torch.equal(ids, order + 1)
    assert torch.equal(values, scores.gather(1, order))


def test_vectors_of_another_format_are_counted_in_fp32() -> None:
    torch.manual_seed(0)
    hidden, vectors = torch.randn(20, 8).bfloat16(), torch.randn(90, 8)
    target_scores = exact_scores(hidden, vectors[:20].bfloat16())
    with kernels(1):
        result = count_better(hidden, vectors, target_scores)
    with plain():
        expected = count_better(hidden, vectors, target_scores)
    assert torch.equal(result.better, expected.better)
    assert torch.equal(result.equal, expected.equal)
