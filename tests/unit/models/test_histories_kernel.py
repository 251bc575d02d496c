"""Self-attention within packed histories by the kernel, against float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mltfr_dist.models.kernels import attend_histories, build
from mltfr_dist.models.packing import Packing
from mltfr_dist.models.transformer import attended

pytestmark = pytest.mark.skipif(
    build.library() is None, reason="no C++ compiler or no AVX2: there are no kernels to test"
)

LENGTHS = {"even": [16, 8, 4], "odd": [50, 9, 7, 3, 1], "gaps": [0, 5, 0, 0, 33, 2, 0], "none": []}


def made(lengths: Sequence[int], heads: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, a gradient, and where histories start."""
    generator = torch.Generator().manual_seed(heads * 100 + dim)
    count = sum(lengths)
    qkv = torch.randn(count, 3, heads, dim, generator=generator)
    gradient = torch.randn(count, heads * dim, generator=generator)
    return qkv, gradient, torch.tensor([0, *lengths]).cumsum(0)


def by_history(qkv: Tensor, lengths: Sequence[int], *, causal: bool) -> Tensor:
    """Each history alone, by torch."""
    read = []
    for some in torch.split(qkv, list(lengths)):
        query, key, value = some.permute(1, 2, 0, 3)  # [H, L, d]
        one = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        read.append(one.transpose(0, 1).flatten(1))
    return torch.cat(read) if len(qkv) else qkv[:, 0].flatten(1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "dim"), [(1, 1), (2, 32), (3, 5), (4, 24)])
@pytest.mark.parametrize("name", LENGTHS)
def test_what_is_read_and_its_gradient(name: str, heads: int, dim: int, causal: bool) -> None:
    lengths = LENGTHS[name]
    qkv, gradient, starts = made(lengths, heads, dim)
    leaf, exact = qkv.clone().requires_grad_(), qkv.double().requires_grad_()
    read = attend_histories(leaf, starts, causal=causal)
    assert read is not None
    wanted = by_history(exact, lengths, causal=causal)
    torch.testing.assert_close(read.double(), wanted, rtol=1e-5, atol=2e-6)
    read.backward(gradient)
    wanted.backward(gradient.double())
    assert leaf.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)


def test_a_history_is_read_alike_alone_in_any_company_and_by_any_number_of_threads() -> None:
    lengths = [21, 4, 30, 1]
    qkv, gradient, starts = made(lengths, 2, 16)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            leaf = qkv.clone().requires_grad_()
            read = attend_histories(leaf, starts, causal=True)
            assert read is not None
            read.backward(gradient)
            results.append((read, leaf.grad))
    finally:
        torch.set_num_threads(threads)
    for read, grad in results[1:]:
        assert read.equal(results[0][0])
        assert grad is not None
        assert grad.equal(results[0][1])
    alone = attend_histories(qkv[25:55], torch.tensor([0, 30]), causal=True)
    assert alone is not None
    assert alone.equal(results[0][0][25:55])


def test_large_logits_do_not_overflow_and_a_broken_number_shows() -> None:
    qkv, _, starts = made([6, 6], 1, 8)
    large = attend_histories(200 * qkv, starts, causal=True)
    assert large is not None
    assert large.isfinite().all()
    qkv[3, 1] = torch.nan
    read = attend_histories(qkv, starts, causal=True)
    assert read is not None
    assert read[3:6].isnan().any(1).all()
    assert read[6:].isfinite().all(), "the other history's"


def test_the_plain_path_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    item_ids = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [7, 0, 0, 0], [8, 9, 1, 2]])
    packing = Packing(item_ids)
    qkv, _, _ = made([11], 2, 8)
    results = {}
    for causal in (True, False):
        results[causal] = attended(qkv, packing, causal=causal, dropout_p=0.0)
    monkeypatch.setenv(build.SWITCH, "off")
    build.library.cache_clear()
    try:
        for causal in (True, False):
            plain = attended(qkv, packing, causal=causal, dropout_p=0.0)
            torch.testing.assert_close(results[causal], plain, rtol=1e-5, atol=1e-6)
    finally:
        build.library.cache_clear()
