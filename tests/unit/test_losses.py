"""Losses against PyTorch's own and against loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mltfr_dist.data.stream.negatives import sample_shared
from mltfr_dist.models import cross_entropy
from mltfr_dist.models.cl4srec import contrastive
from mltfr_dist.models.cross_entropy import full_cross_entropy
from mltfr_dist.models.losses import (
    Negatives,
    binary_cross_entropy,
    generalised_binary_cross_entropy,
    sampled_softmax,
)


def drawn(
    n: int = 13, items: int = 31, dim: int = 8, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n * 1000 + items)
    hidden = torch.randn(n, dim, generator=generator, dtype=dtype).requires_grad_()
    vectors = torch.randn(items, dim, generator=generator, dtype=dtype).requires_grad_()
    targets = torch.randint(1, items + 1, (n,), generator=generator)
    return hidden, vectors, targets, torch.rand(n, generator=generator)


def reference(
    hidden: Tensor, vectors: Tensor, targets: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Value and gradients by F.cross_entropy in float64."""
    hidden, vectors = (t.detach().double().requires_grad_() for t in (hidden, vectors))
    value = (
        F.cross_entropy(hidden @ vectors.T, targets - 1, reduction="none") * weights.double()
    ).sum()
    return value.detach(), *torch.autograd.grad(value, [hidden, vectors])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("chunk", [1, 5, 13, 1 << 20], ids=lambda c: f"chunk{c}")
@pytest.mark.parametrize("tile", [1, 7, 1 << 20], ids=lambda t: f"tile{t}")
def test_cross_entropy_equals_pytorchs_whatever_the_chunks(
    dtype: torch.dtype, chunk: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "chunk_shape", lambda num_items, device: (chunk, tile))
    hidden, vectors, targets, weights = drawn(dtype=dtype)
    value, grad_hidden, grad_vectors = reference(hidden, vectors, targets, weights)
    result = full_cross_entropy(hidden, vectors, targets, weights)
    result.backward()
    assert result.item() == pytest.approx(value.item(), rel=1e-6)
    assert hidden.grad is not None
    assert vectors.grad is not None
    assert hidden.grad.dtype == vectors.grad.dtype == dtype
    torch.testing.assert_close(hidden.grad.double(), grad_hidden, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(vectors.grad.double(), grad_vectors, rtol=1e-5, atol=1e-6)


def test_chunks_are_never_thin_and_their_memory_is_bounded() -> None:
    for num_items in (1, 1_682, 12_101, 100_000, 1_000_000, 10_000_000):
        for device, elements in (("cpu", 64 * 12_288), ("cuda", 1 << 26)):
            rows, width = cross_entropy.chunk_shape(num_items, device)
            assert rows >= 64
            assert rows * num_items <= max(elements, 64 * num_items)
            assert rows * width <= elements or (device == "cuda" and width == num_items)
            assert -(-num_items // width) * width < num_items + 2 * width


def test_cross_entropy_over_many_items() -> (
    None
):  # in chunks of 64 and 6 positions, tiles of 12,000 items
    torch.manual_seed(0)
    hidden, weights = torch.randn(70, 4, requires_grad=True), torch.ones(70)
    vectors = (0.1 * torch.randn(300_000, 4)).requires_grad_()
    targets = torch.randint(1, 300_001, (70,))
    value, grad_hidden, grad_vectors = reference(hidden, vectors, targets, weights)
    result = full_cross_entropy(hidden, vectors, targets, weights)
    result.backward()
    assert hidden.grad is not None
    assert vectors.grad is not None
    assert result.item() == pytest.approx(value.item(), rel=1e-6)
    torch.testing.assert_close(hidden.grad.double(), grad_hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vectors.grad.double(), grad_vectors, rtol=1e-4, atol=1e-5)


def test_cross_entropy_is_a_weighted_sum() -> None:
    hidden, vectors, targets, _ = drawn()
    weights = torch.zeros(len(targets))
    weights[4] = 2.5
    expected = 2.5 * F.cross_entropy(hidden[4:5] @ vectors.T, targets[4:5] - 1)
    assert full_cross_entropy(hidden, vectors, targets, weights).item() == pytest.approx(
        expected.item(), rel=1e-6
    )
    blocks = [
        full_cross_entropy(hidden[i : i + 5], vectors, targets[i : i + 5], weights[i : i + 5])
        for i in (0, 5, 10)
    ]
    assert sum(block.item() for block in blocks) == pytest.approx(expected.item(), rel=1e-6)


def test_cross_entropy_of_a_hand_worked_case() -> None:
    # Logits 0, ln 2, ln 5: probabilities 1/8, 2/8, 5/8.
    vectors = torch.tensor([[0.0], [math.log(2)], [math.log(5)]])
    result = full_cross_entropy(
        torch.ones(2, 1), vectors, torch.tensor([1, 3]), torch.tensor([1.0, 2.0])
    )
    assert result.item() == pytest.approx(math.log(8) + 2 * math.log(8 / 5))


def test_cross_entropy_scales_with_the_outer_gradient() -> None:
    hidden, vectors, targets, weights = drawn()
    _, grad_hidden, grad_vectors = reference(hidden, vectors, targets, weights)
    (full_cross_entropy(hidden, vectors, targets, weights) * -0.5).backward()
    torch.testing.assert_close(hidden.grad, -0.5 * grad_hidden.float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(vectors.grad, -0.5 * grad_vectors.float(), rtol=1e-4, atol=1e-6)


def test_cross_entropy_passes_gradcheck() -> None:
    hidden, vectors, targets, weights = drawn(n=4, items=6, dim=3, dtype=torch.float64)
    # The loss is rounded to fp32, so differences are taken over a wide step.
    assert torch.autograd.gradcheck(
        lambda h, v: full_cross_entropy(h, v, targets, weights).double(),
        (hidden, vectors),
        eps=1e-2,
        atol=1e-3,
        rtol=1e-2,
    )


def test_cross_entropy_of_no_position_is_zero_and_differentiable() -> None:
    hidden, vectors, targets, weights = drawn(n=0)
    result = full_cross_entropy(hidden, vectors, targets, weights)
    result.backward()
    assert result.item() == 0
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, 8)
    assert torch.equal(vectors.grad, torch.zeros_like(vectors))


def test_cross_entropy_survives_huge_logits() -> None:
    vectors = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    hidden = torch.tensor([[1e4]], requires_grad=True)
    result = full_cross_entropy(hidden, vectors, torch.tensor([2]), torch.ones(1))
    result.backward()
    assert result.item() == pytest.approx(2e4)
    assert hidden.grad.item() == pytest.approx(2.0)


def test_cross_entropy_changes_none_of_its_inputs() -> None:
    hidden, vectors, targets, weights = drawn()
    before = [t.detach().clone() for t in (hidden, vectors, targets, weights)]
    full_cross_entropy(hidden, vectors, targets, weights).backward()
    assert all(
        torch.equal(a, b) for a, b in zip(before, (hidden, vectors, targets, weights), strict=True)
    )


def test_cross_entropy_in_bf16_stays_near_fp32() -> None:
    hidden, vectors, targets, weights = drawn()
    low = [t.detach().bfloat16().requires_grad_() for t in (hidden, vectors)]
    value, grad_hidden, _ = reference(low[0].float(), low[1].float(), targets, weights)
    result = full_cross_entropy(*low, targets, weights)
    result.backward()
    assert result.dtype == torch.float32
    assert low[0].grad.dtype == torch.bfloat16
    assert result.item() == pytest.approx(value.item(), rel=2e-2)
    torch.testing.assert_close(low[0].grad.double(), grad_hidden, rtol=5e-2, atol=3e-2)


def naive_binary(hidden: Tensor, positive: Tensor, negative: Tensor, weights: Tensor) -> float:
    total = 0.0
    for n in range(len(hidden)):
        loss = -math.log(1 / (1 + math.exp(-float(hidden[n] @ positive[n]))))
        others = [-math.log(1 - 1 / (1 + math.exp(-float(hidden[n] @ row)))) for row in negative[n]]
        total += float(weights[n]) * (loss + sum(others) / len(others))
    return total


@pytest.mark.parametrize("num_negatives", [1, 3])
def test_binary_cross_entropy_equals_a_loop(num_negatives: int) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, positive = (
        torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    negative = torch.randn(6, num_negatives, 4, generator=generator, dtype=torch.float64)
    weights = torch.rand(6, generator=generator)
    result = binary_cross_entropy(hidden, positive, negative, weights)
    assert result.item() == pytest.approx(
        naive_binary(hidden, positive, negative, weights), rel=1e-6
    )


def test_binary_cross_entropy_passes_gradients_to_all_three() -> None:
    hidden, positive = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    negative = torch.randn(3, 2, 4, requires_grad=True)
    binary_cross_entropy(hidden, positive, negative, torch.tensor([1.0, 0.0, 2.0])).backward()
    # d/d positive of -log s(h.p) is (s - 1) h; a position of weight 0 gets none.
    slope = (
        (torch.sigmoid((hidden * positive).sum(1, keepdim=True)) - 1)
        * hidden
        * torch.tensor([[1.0], [0.0], [2.0]])
    )
    torch.testing.assert_close(positive.grad, slope.detach())
    assert negative.grad[1].abs().sum() == 0
    assert negative.grad[0].abs().sum() > 0


def test_binary_cross_entropy_of_no_position_is_zero() -> None:
    assert (
        binary_cross_entropy(
            torch.zeros(0, 4), torch.zeros(0, 4), torch.zeros(0, 2, 4), torch.zeros(0)
        ).item()
        == 0
    )


# --- gBCE, sampled softmax, contrast
# -----------------------------------------------------------------------------


def naive_gbce(
    hidden: Tensor, positive: Tensor, negative: Tensor, weights: Tensor, items: int, t: float
) -> float:
    """As the paper writes it: the positive's probability raised to beta."""
    total = 0.0
    alpha = negative.shape[1] / (items - 1)
    beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
    for n in range(len(hidden)):
        loss = -math.log((1 / (1 + math.exp(-float(hidden[n] @ positive[n])))) ** beta)
        loss -= sum(
            math.log(1 - 1 / (1 + math.exp(-float(hidden[n] @ row)))) for row in negative[n]
        )
        total += float(weights[n]) * loss / (negative.shape[1] + 1)
    return total


@pytest.mark.parametrize("calibration", [0.0, 0.75, 1.0])
@pytest.mark.parametrize("num_negatives", [1, 4])
def test_gbce_equals_the_papers_formula(calibration: float, num_negatives: int) -> None:
    generator = torch.Generator().manual_seed(1)
    hidden, positive = (
        torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    negative = torch.randn(6, num_negatives, 4, generator=generator, dtype=torch.float64)
    weights = torch.rand(6, generator=generator)
    keys = {"num_items": 50, "calibration": calibration}
    result = generalised_binary_cross_entropy(hidden, positive, negative, weights, **keys)
    assert result.item() == pytest.approx(
        naive_gbce(hidden, positive, negative, weights, 50, calibration), rel=1e-6
    )
    if calibration == 0 and num_negatives == 1:
        assert 2 * result.item() == pytest.approx(
            binary_cross_entropy(hidden, positive, negative, weights).item()
        )


def test_sampled_softmax_over_every_item_once_is_the_full_one() -> None:
    hidden, vectors, targets, weights = drawn(dtype=torch.float64)
    ids = torch.randperm(31) + 1
    negatives = Negatives(
        ids, vectors[ids - 1], torch.full((31,), -math.log(31), dtype=torch.float64)
    )
    sampled = sampled_softmax(hidden, targets, vectors[targets - 1], negatives, weights.double())
    full = full_cross_entropy(hidden, vectors, targets, weights)
    assert sampled.item() == pytest.approx(full.item(), rel=1e-9)
    for a, b in zip(
        torch.autograd.grad(sampled, [hidden, vectors]),
        torch.autograd.grad(full, [hidden, vectors]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("proposal", ["uniform", "log_uniform"])
def test_sampled_softmax_tends_to_the_full_one_and_only_with_the_correction(proposal: str) -> None:
    hidden, vectors, targets, weights = (t.detach() for t in drawn(dtype=torch.float64))
    ids, logarithms = (
        torch.from_numpy(a)
        for a in sample_shared(100_000, proposal, num_items=31, seed=0, epoch=0, step=0)
    )
    full = full_cross_entropy(hidden, vectors, targets, weights).item()

    def value(log_probability: Tensor) -> float:
        return sampled_softmax(
            hidden,
            targets,
            vectors[targets - 1],
            Negatives(ids, vectors[ids - 1], log_probability),
            weights,
        ).item()

    assert value(logarithms) == pytest.approx(full, rel=5e-3)
    if proposal == "log_uniform":
        assert value(torch.full_like(logarithms, -math.log(31))) != pytest.approx(full, rel=1e-2)


def test_sampled_softmax_leaves_out_the_target_among_the_negatives() -> None:
    hidden, vectors, targets, weights = drawn()
    ids = targets[:1]
    negatives = Negatives(ids, vectors[ids - 1], torch.zeros(1))
    assert (
        sampled_softmax(
            hidden[:1], targets[:1], vectors[targets[:1] - 1], negatives, weights[:1]
        ).item()
        == 0
    )
    none = torch.zeros(0).long()
    assert sampled_softmax(hidden[:0], none, vectors[none], negatives, weights[:0]).item() == 0


def naive_contrast(
    first: Tensor, second: Tensor, present: list[bool], group: int, temperature: float
) -> float:
    total = 0.0
    for start in range(0, len(first), group):
        views = [
            (p, v) for p in range(start, start + group) if present[p] for v in (first[p], second[p])
        ]
        for i, (owner, view) in enumerate(views):
            scores = {
                j: float((view @ other).detach()) / temperature
                for j, (_, other) in enumerate(views)
                if j != i
            }
            partner = next(j for j in scores if views[j][0] == owner)
            total -= scores[partner] - math.log(sum(math.exp(s) for s in scores.values()))
    return total / 2


@pytest.mark.parametrize("group", [2, 4])
def test_contrast_equals_a_loop_and_groups_add_up(group: int) -> None:
    generator = torch.Generator().manual_seed(group)
    first, second = (
        torch.randn(8, 5, generator=generator, dtype=torch.float64).requires_grad_()
        for _ in range(2)
    )
    present = [True] * 5 + [False] * 3
    mask = torch.tensor(present)
    keys = {"group_size": group, "temperature": 0.7}
    result = contrastive(first, second, mask, **keys)
    assert result.item() == pytest.approx(naive_contrast(first, second, present, group, 0.7))
    blocks = [
        contrastive(first[i : i + 4], second[i : i + 4], mask[i : i + 4], **keys) for i in (0, 4)
    ]
    assert sum(block.item() for block in blocks) == pytest.approx(result.item())
    result.backward()
    for t in (first, second):
        assert torch.isfinite(t.grad).all()
        assert t.grad[5:].abs().sum() == 0
        assert t.grad[:4].abs().sum(1).min() > 0


def test_contrast_of_absent_sequences_is_zero() -> None:
    vectors = torch.randn(4, 3, requires_grad=True)
    result = contrastive(
        vectors, vectors, torch.zeros(4, dtype=torch.bool), group_size=2, temperature=1.0
    )
    result.backward()
    assert result.item() == 0
    assert vectors.grad.abs().sum() == 0
