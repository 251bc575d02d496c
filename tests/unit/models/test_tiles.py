"""Ranking in tiles: to the bit what scores that are all at hand give, whatever the tiling, the ties
and the division.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from mltfr_dist.models.kernels import build, ranking
from mltfr_dist.models.rank_counts import LogNormaliser, RankCounts, count_better
from mltfr_dist.models.tiles import Pairs, exact_scores
from mltfr_dist.models.top_items import top_items

NO = -math.inf
SHAPES = ((6, 17), (5, 64), (64, 1000), (100, 333), None)


@pytest.fixture(autouse=True, params=["kernels", "tiles"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test goes both ways; with kernels also where few users would not pay."""
    if request.param == "tiles":
        monkeypatch.setattr(build, "library", lambda: None)
    elif build.library() is None:
        pytest.skip("no C++ compiler or no AVX2: there are no kernels to test")
    monkeypatch.setattr(ranking, "MIN_USERS", 1)
    return str(request.param)


def draw(seed: int, users: int, items: int, dim: int) -> tuple[Tensor, Tensor, Pairs, Tensor]:
    """States, vectors with many ties and near-ties, seen pairs, and targets."""
    draws = torch.Generator().manual_seed(seed)
    hidden = torch.randn(users, dim, generator=draws)
    distinct = torch.randn(items // 4, dim, generator=draws)
    vectors = distinct[torch.randint(len(distinct), (items,), generator=draws)]  # ties
    vectors[::3] *= 1 + 2.0**-23  # nearer than a product of matrices tells apart
    rows = torch.randint(users, (users * 5,), generator=draws)
    seen = Pairs(rows, torch.randint(items, (len(rows),), generator=draws) + 1)
    return hidden, vectors, seen, torch.randint(items, (users,), generator=draws) + 1


def all_scores(hidden: Tensor, vectors: Tensor, exclude: Pairs | None = None) -> Tensor:
    """[B, R] of every pair, as defined; excluded ones -inf."""
    scores = exact_scores(hidden[:, None], vectors)
    if exclude is not None:
        scores[exclude.rows, exclude.item_ids - 1] = NO
    return scores


def counted(scores: Tensor, target_scores: Tensor) -> RankCounts:
    target = target_scores[:, None]
    return RankCounts((scores > target).sum(1), (scores == target).sum(1))


def with_targets(seen: Pairs, targets: Tensor) -> Pairs:
    rows = torch.arange(len(targets))
    return Pairs(torch.cat([seen.rows, rows]), torch.cat([seen.item_ids, targets]))


@pytest.mark.parametrize("dim", [1, 5, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_counts_are_those_of_all_scores_for_any_tile(dim: int, shape: tuple[int, int]) -> None:
    hidden, vectors, seen, targets = draw(dim, 37, 400, dim)
    exclude = with_targets(seen, targets)
    target_scores = exact_scores(hidden, vectors[targets - 1])
    expected = counted(all_scores(hidden, vectors, exclude), target_scores)
    assert expected.equal.sum() > 20
    result = count_better(hidden, vectors, target_scores, exclude=exclude, tile=shape)
    assert torch.equal(result.better, expected.better)
    assert torch.equal(result.equal, expected.equal)


def test_counts_of_parts_of_the_items_add_up_for_any_cut() -> None:
    hidden, vectors, seen, targets = draw(0, 20, 300, 8)
    exclude = with_targets(seen, targets)
    target_scores = exact_scores(hidden, vectors[targets - 1])
    whole = count_better(hidden, vectors, target_scores, exclude=exclude)
    for cuts in ((100, 200), (1, 2, 299), (150,)):
        ends = (0, *cuts, 300)
        blocks = [
            count_better(hidden, vectors[a:b], target_scores, exclude=exclude, first_id=a + 1)
            for a, b in itertools.pairwise(ends)
        ]
        assert torch.equal(sum(p.better for p in blocks), whole.better)
        assert torch.equal(sum(p.equal for p in blocks), whole.equal)


def test_users_do_not_change_each_others_counts() -> None:
    hidden, vectors, _, targets = draw(3, 30, 200, 8)
    target_scores = exact_scores(hidden, vectors[targets - 1])
    whole = count_better(hidden, vectors, target_scores)
    for row in range(30):
        one = slice(row, row + 1)
        alone = count_better(hidden[one], vectors, target_scores[one])
        assert (alone.better.item(), alone.equal.item()) == (whole.better[row], whole.equal[row])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_number_format_has_its_own_exact_scores(dtype: torch.dtype) -> None:
    hidden, vectors, seen, targets = draw(4, 20, 200, 8)
    hidden, vectors = hidden.to(dtype), vectors.to(dtype)
    target_scores = exact_scores(hidden, vectors[targets - 1])
    assert target_scores.dtype == (dtype if dtype == torch.float64 else torch.float32)
    expected = counted(all_scores(hidden, vectors, seen), target_scores)
    result = count_better(hidden, vectors, target_scores, exclude=seen, tile=(7, 33))
    assert torch.equal(result.better, expected.better)
    assert torch.equal(result.equal, expected.equal)


def test_vectors_are_brought_to_the_format_of_the_states() -> None:
    """As in training, where a table of fp32 gives bf16 vectors: 1 + 2^-12 is then 1."""
    hidden = torch.ones(1, 2, dtype=torch.bfloat16)
    vectors = torch.tensor([[1.0, 1.0], [1 + 2.0**-12, 1.0], [1.0, 1.5]])
    result = count_better(hidden, vectors, torch.tensor([2.0]))
    assert (result.better.item(), result.equal.item()) == (1, 2)


def test_a_collapsed_model_ties_with_every_item() -> None:
    hidden, vectors = torch.randn(3, 6), torch.randn(1, 6).repeat(500, 1)
    result = count_better(hidden, vectors, exact_scores(hidden, vectors[:3]), tile=(2, 100))
    assert result.better.tolist() == [0, 0, 0]
    assert result.equal.tolist() == [500, 500, 500]
    zero = count_better(torch.zeros(2, 6), torch.randn(50, 6), torch.zeros(2))
    assert (zero.better.tolist(), zero.equal.tolist()) == ([0, 0], [50, 50])


def test_products_of_lower_precision_change_no_count() -> None:
    hidden, vectors, seen, targets = draw(5, 20, 300, 16)
    target_scores = exact_scores(hidden, vectors[targets - 1])
    expected = count_better(hidden, vectors, target_scores, exclude=seen)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        result = count_better(hidden, vectors, target_scores, exclude=seen)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(result.better, expected.better)
    assert torch.equal(result.equal, expected.equal)


def test_the_normaliser_takes_in_every_score() -> None:
    hidden, vectors, seen, targets = draw(6, 20, 300, 8)
    target_scores = exact_scores(hidden, vectors[targets - 1])
    normaliser = LogNormaliser(hidden)
    count_better(hidden, vectors, target_scores, exclude=seen, normaliser=normaliser, tile=(6, 50))
    expected = (hidden.double() @ vectors.double().T).logsumexp(1)
    torch.testing.assert_close(normaliser.value, expected, rtol=1e-6, atol=1e-6)


def test_no_user_and_no_item_count_as_nothing() -> None:
    none = count_better(torch.zeros(0, 4), torch.randn(9, 4), torch.zeros(0))
    assert (none.better.shape, none.equal.shape) == ((0,), (0,))
    nothing = count_better(torch.randn(3, 4), torch.zeros(0, 4), torch.zeros(3))
    assert nothing.better.tolist() == [0, 0, 0]
    assert top_items(torch.zeros(0, 4), torch.randn(9, 4), 3)[1].shape == (0, 3)
    assert top_items(torch.randn(2, 4), torch.zeros(0, 4), 3)[1].tolist() == [[0] * 3] * 2


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["hidden", "item", "target"])
def test_what_is_not_finite_has_no_rank(value: float, where: str) -> None:
    """A NaN compares false with everything, so an unchecked model that diverged would rank
    first.
    """
    hidden, vectors, target = torch.randn(3, 4), torch.randn(9, 4), torch.zeros(3)
    {"hidden": hidden[1], "item": vectors[5], "target": target}[where][1] = value
    with pytest.raises(ValueError, match="diverged"):
        count_better(hidden, vectors, target)
    if where != "target":
        with pytest.raises(ValueError, match="diverged"):
            top_items(hidden, vectors, 2)


# --- top items --------------------------------------------------------------------------------


def sorted_scores(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """By score, then by lower id."""
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    values = scores.gather(1, order)
    return values, torch.where(values > NO, order + 1, 0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dim", "k"), [(1, 5), (8, 1), (8, 30), (8, 400)])
def test_top_items_are_those_of_all_scores_sorted(shape: tuple[int, int], dim: int, k: int) -> None:
    hidden, vectors, seen, _ = draw(k, 37, 400, dim)
    expected = sorted_scores(all_scores(hidden, vectors, seen), k)
    values, ids = top_items(hidden, vectors, k, exclude=seen, tile=shape)
    assert torch.equal(values, expected[0])
    assert torch.equal(ids, expected[1])


def test_top_items_of_wide_tiles_look_at_runs_only_and_miss_nothing() -> None:
    hidden, vectors, seen, _ = draw(7, 3, 5000, 4)
    expected = sorted_scores(all_scores(hidden, vectors, seen), 6)
    result = top_items(hidden, vectors, 6, exclude=seen)
    assert torch.equal(result[0], expected[0])
    assert torch.equal(result[1], expected[1])


def test_of_many_equal_scores_the_lowest_ids_come_first() -> None:
    """More ties than are looked at beyond the k best."""
    hidden, vectors = torch.randn(4, 6), torch.randn(3, 6).repeat(200, 1)
    expected = sorted_scores(all_scores(hidden, vectors), 10)
    values, ids = top_items(hidden, vectors, 10, tile=(3, 64))
    assert torch.equal(ids, expected[1])
    assert torch.equal(values, expected[0])
    assert all((row.diff() == 3).all() for row in ids)


def test_the_best_of_parts_are_the_best_of_all() -> None:
    hidden, vectors, seen, _ = draw(8, 15, 300, 4)
    whole = top_items(hidden, vectors, 12, exclude=seen)
    blocks = [
        top_items(hidden, vectors[a : a + 100], 12, exclude=seen, first_id=a + 1)
        for a in (0, 100, 200)
    ]
    scores, ids = (torch.cat(block, dim=1) for block in zip(*blocks, strict=True))
    values, order = sorted_scores(scores, 12)
    assert torch.equal(values, whole[0])
    assert torch.equal(ids.gather(1, order - 1), whole[1])


def test_fewer_items_than_asked_for_leave_empty_places() -> None:
    hidden, vectors = torch.tensor([[1.0]]), torch.tensor([[3.0], [1.0], [2.0]])
    seen = Pairs(torch.tensor([0]), torch.tensor([3]))
    values, ids = top_items(hidden, vectors, 5, exclude=seen)
    assert values.tolist() == [[3.0, 1.0, NO, NO, NO]]
    assert ids.tolist() == [[1, 2, 0, 0, 0]]


def test_a_score_does_not_depend_on_what_is_scored_beside_it() -> None:
    hidden, vectors = torch.randn(50, 37), torch.randn(50, 37)
    together = exact_scores(hidden, vectors)
    assert torch.equal(together, torch.stack([exact_scores(h, v) for h, v in zip(hidden, vectors)]))
    expected = [math.fsum((h.double() * v.double()).tolist()) for h, v in zip(hidden, vectors)]
    assert torch.equal(together, torch.tensor(expected, dtype=torch.float64).float())
