"""The benchmark of growth: its arithmetic."""

from __future__ import annotations

import pytest

from benchmarks import growth

SIZES = (4, 16, 64, 256)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_slope_of_a_power_is_its_exponent(power: float) -> None:
    """Whatever the factor."""
    result = growth.slopes(SIZES, [3.5 * size**power for size in SIZES])

    assert result == pytest.approx((power, power), abs=1e-12)


def test_a_part_that_does_not_grow_weighs_least_at_the_end() -> None:
    """A quadratic cost that a constant hides from the line through all shows in the last slope."""
    whole, last = growth.slopes(SIZES, [2000 + size**2 for size in SIZES])

    assert whole < growth.LINEAR < 1.5 < last < 2


def test_what_grows_faster_than_linearly_is_named() -> None:
    """By either slope, and nothing else."""
    curves = {
        "linear": {"slopes": (1.0, 1.02)},
        "falling": {"slopes": (-0.3, 0.0)},
        "whole": {"slopes": (1.4, 1.0)},
        "end": {"slopes": (0.7, 1.9)},
    }

    result = growth.above_linear({"V": curves})

    assert result == ["whole by V (1.40, at the end 1.00)", "end by V (0.70, at the end 1.90)"]
