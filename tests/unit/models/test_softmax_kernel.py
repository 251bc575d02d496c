"""Exponentials of logits by the kernel, against float64."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mltfr_dist.models import cross_entropy
from mltfr_dist.models.kernels import build, exponentials

pytestmark = pytest.mark.skipif(
    build.library() is None, reason="no C++ compiler or no AVX2: there are no kernels to test"
)


@pytest.mark.parametrize("width", [1, 7, 8, 15, 16, 17, 255, 512, 3000])
@pytest.mark.parametrize("before", [-torch.inf, -100.0, 0.0, 30.0])
def test_exponentials_and_sums(width: int, before: float) -> None:
    logits = 20 * torch.randn(13, width)
    logits[0] = -200  # far below another tile's largest: 0, and no number between
    largest = torch.full((13, 1), before)
    shifts = torch.maximum(largest, logits.amax(1, keepdim=True))
    expected = (logits - shifts).double().exp()
    made = exponentials(logits, largest)
    assert made is not None
    assert made[0].equal(shifts)
    assert largest.eq(before).all()
    torch.testing.assert_close(logits.double(), expected, rtol=4e-7, atol=2e-38)
    torch.testing.assert_close(
        made[1].double(), expected.sum(1, keepdim=True), rtol=4e-7, atol=1e-37
    )


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("at", [0, 15, 16, 36])
def test_a_broken_number_is_seen_in_its_row_alone(bad: float, at: int) -> None:
    logits = torch.randn(3, 37)
    logits[1, at] = bad
    made = exponentials(logits, torch.full((3, 1), -torch.inf))
    assert made is not None
    assert made[1].isfinite()[:, 0].tolist() == [True, False, True]


def test_the_loss_is_that_of_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight = torch.randn(150, 16), torch.randn(20_000, 16)  # two tiles
    targets, weights = torch.randint(1, 20_001, (150,)), torch.rand(150)
    results = []
    for kernel in (exponentials, lambda *_: None):
        monkeypatch.setattr(cross_entropy, "exponentials", kernel)
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = cross_entropy.full_cross_entropy(h, w, targets, weights)
        results.append((loss, *torch.autograd.grad(loss, (h, w))))
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    each = F.cross_entropy(h @ w.T, targets - 1, reduction="none")
    exact = (each * weights.double()).sum()
    expected = (exact, *torch.autograd.grad(exact, (h, w)))
    for values in results:
        for value, wanted in zip(values, expected, strict=True):
            torch.testing.assert_close(value.double(), wanted, rtol=2e-5, atol=2e-6)
