"""Dropout: its share, its scale, its gradient, and what its masks follow from."""

from __future__ import annotations

import pytest
import torch

from mltfr_dist.distributed import checkpoint
from mltfr_dist.models.dropout import Dropout, scaled_masks
from mltfr_dist.training.seeds import seed_all


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5, 0.9])
def test_the_share_is_p_and_the_mean_stays(p: float) -> None:
    torch.manual_seed(0)
    dropped = Dropout(p)(torch.ones(1000, 501))
    assert set(dropped.unique().tolist()) == {0.0, float(torch.tensor(1 / (1 - p)))}
    share = (dropped == 0).double()
    deviation = (p * (1 - p) / share.numel()) ** 0.5
    assert abs(float(share.mean()) - p) < 4 * deviation
    for block in (share.mean(0), share.mean(1)):  # no place of a row, and no row, is preferred
        assert float((block - p).abs().max()) < 6 * (p * (1 - p) / 500) ** 0.5


def test_neighbours_are_dropped_independently() -> None:
    torch.manual_seed(0)
    kept = (Dropout(0.5)(torch.ones(500_000)) > 0).double() - 0.5
    for apart in (1, 2, 3, 4, 8, 16, 32, 64, 256):
        correlation = 4 * float((kept[:-apart] * kept[apart:]).mean())
        assert abs(correlation) < 4 / 500_000**0.5


def test_the_gradient_passes_where_the_number_did() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 7, requires_grad=True)
    y = Dropout(0.3)(x)
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad * x.detach(), y.detach())


def test_masks_are_a_function_of_seed_step_and_rank() -> None:
    dropout, x = Dropout(0.5), torch.ones(64)

    def masks(*keys: int) -> torch.Tensor:
        seed_all(*keys)
        return torch.stack([dropout(x), dropout(x)])

    first = masks(0, 0, 7, 0)
    assert torch.equal(first, masks(0, 0, 7, 0))  # as after a resume
    assert not torch.equal(first[0], first[1])
    for other in ((1, 0, 7, 0), (0, 1, 7, 0), (0, 0, 8, 0), (0, 0, 7, 1)):
        assert not torch.equal(first, masks(*other))


def test_what_is_drawn_belongs_to_the_number_in_checkpoints() -> None:
    """Whoever changes the draws changes :data:`checkpoint.DRAWS`, or runs go on with others."""
    torch.manual_seed(0)
    (mask,) = scaled_masks([(64,)], [0.5])
    kept = "".join("01"[int(number > 0)] for number in mask)
    assert kept == "0110100000101000111110011110111100101011100000000100010000000000"
    of_cpu = [checkpoint.drawn_as_now(draws, on_cpu=True) for draws in range(1, 7)]
    assert of_cpu == [False, False, True, True, True, False]
    of_gpu = [checkpoint.drawn_as_now(draws, on_cpu=False) for draws in range(1, 7)]
    assert of_gpu == [False, False, False, False, True, False]


def test_nothing_is_dropped_outside_training_or_at_zero() -> None:
    x = torch.randn(5)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_format_stays(dtype: torch.dtype) -> None:
    assert Dropout(0.5)(torch.ones(3, 4, dtype=dtype)).dtype == dtype


def test_no_number_is_no_error() -> None:
    assert Dropout(0.5)(torch.ones(0, 4)).shape == (0, 4)
