"""A gradient that is not finite is seen, whichever number it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mltfr_dist.distributed.health import Health
from mltfr_dist.distributed.ranks import ALONE

SIZE = 101


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_number_of_a_gradient_is_enough(dtype: torch.dtype, bad: float) -> None:
    module = nn.ParameterDict({name: torch.ones(SIZE, dtype=dtype) for name in ("good", "bad")})
    health = Health(module, torch.optim.SGD(module.parameters(), 0.1), ALONE)
    for index in (None, *range(SIZE)):
        slopes = {name: torch.randn(SIZE, dtype=dtype) for name in ("good", "bad")}
        if index is not None:
            slopes["bad"][index] = bad
        for name, slope in slopes.items():
            (module[name] * slope).sum().backward()
        sums = torch.tensor([3.0], dtype=torch.float64)
        assert health.read(health.agree(sums)).equal(sums)
        assert health.verdict.nonfinite == (() if index is None else ("bad",))
