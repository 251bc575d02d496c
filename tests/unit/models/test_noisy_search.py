"""The search that looks at noise first finds what the search of everything does."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mltfr_dist.models.draws import GumbelNoise, words_of
from mltfr_dist.models.kernels import noisy_candidates, usable
from mltfr_dist.models.noisy_search import noisy_rows
from mltfr_dist.models.search import search

needs_kernels = pytest.mark.skipif(
    usable(torch.empty(0)) is None, reason="this machine has no CPU kernels"
)


def unit(rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return F.normalize(rows.to(dtype), dim=-1)


def inputs(num_queries: int, num_rows: int, scale: float) -> tuple[Tensor, Tensor, GumbelNoise]:
    torch.manual_seed(0)
    rows = torch.randn(num_rows, 8)
    # as close as can be to some rows and opposite to others, so that cosines do decide
    query = F.normalize(rows[torch.randint(num_rows, (num_queries,))], dim=-1)
    keys = torch.randint(1 << 62, (num_queries,))
    return query, rows, GumbelNoise(keys, torch.arange(num_rows), scale)


@needs_kernels
@pytest.mark.parametrize(
    ("num_queries", "num_rows", "num_kept", "scale"),
    [(60, 4000, 1, 1.0), (3, 4000, 7, 0.6), (5, 30, 30, 1.0), (9, 700, 40, 3.0), (0, 50, 1, 1.0)],
)
def test_noise_first_finds_what_a_search_of_all_finds(
    num_queries: int, num_rows: int, num_kept: int, scale: float
) -> None:
    query, rows, noise = inputs(num_queries, num_rows, scale)
    by_noise = noisy_rows(query, rows, unit, num_kept, noise)
    assert by_noise is not None
    assert torch.equal(by_noise, search(query, unit(rows), num_kept, noise))


@needs_kernels
def test_candidates_are_all_rows_within_reach_and_few_more() -> None:
    query, _, noise = inputs(200, 5000, 1.0)
    near = noisy_candidates(*words_of(noise.keys, noise.row_ids), 1, 2.0)
    assert near is not None
    indices, counts = near
    values = noise.of(slice(None))
    within = values >= values.amax(1, keepdim=True) - 2.0
    for g in range(len(query)):
        wanted, given = set(within[g].nonzero()[:, 0].tolist()), indices[g, : counts[g]].tolist()
        assert wanted <= set(given)
        assert given == sorted(given)
    assert counts.sum() < 1.2 * within.sum() + len(query)


@needs_kernels
def test_room_grows_where_many_rows_are_near() -> None:
    _, _, noise = inputs(2, 3000, 1.0)
    near = noisy_candidates(*words_of(noise.keys, noise.row_ids), 1, 30.0)
    assert near is not None
    assert near[1].tolist() == [3000, 3000]
    assert torch.equal(near[0][1], torch.arange(3000))


def test_little_noise_and_other_formats_are_left_to_the_search_of_all() -> None:
    query, rows, noise = inputs(4, 100, 0.1)
    assert noisy_rows(query, rows, unit, 1, noise) is None
    assert noisy_rows(query, rows, unit, 1, None) is None
    assert noisy_rows(query.bfloat16(), rows, unit, 1, noise._replace(scale=1.0)) is None
