"""A gradient that is not finite is seen, whichever number it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mltfr_dist.distributed.health import Health
from mltfr_dist.distributed.ranks import ALONE
from mltfr_dist.models.kernels import nonfinite

SIZE = 101


@pytest.mark.parametrize("keeps_gradients", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_number_of_a_gradient_is_enough(
    dtype: torch.dtype, bad: float, keeps_gradients: bool
) -> None:
    module = nn.ParameterDict({name: torch.ones(SIZE, dtype=dtype) for name in ("good", "bad")})
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    health = Health(module, optimizer, ALONE, keeps_gradients=keeps_gradients)
    for index in (None, *range(SIZE)):
        slopes = {name: torch.randn(SIZE, dtype=dtype) for name in ("good", "bad")}
        if index is not None:
            slopes["bad"][index] = bad
        for name, slope in slopes.items():
            (module[name] * slope).sum().backward()
        sums = torch.tensor([3.0], dtype=torch.float64)
        assert health.read(health.agree(sums)).equal(sums)
        assert health.verdict.nonfinite == (() if index is None else ("bad",))
        optimizer.zero_grad()


def test_the_kernel_sees_every_number_of_every_tensor() -> None:
    """Of tensors of no number, of one, and of more than a thread looks at; also of columns."""
    tensors = [torch.zeros(0), torch.ones(()), torch.randn(70_001), torch.randn(9, 5).T]
    flags = nonfinite(tensors)
    if flags is None:
        pytest.skip("no kernels on this machine")
    assert flags.tolist() == [0, 0, 0, 0]
    for i, index in ((1, 0), (2, 0), (2, 16_384), (2, 70_000), (3, 44)):
        broken = [t.clone() for t in tensors]
        broken[i].reshape(-1).data[index] = float("inf")
        broken[3] = broken[3] if i != 3 else tensors[3].clone().fill_(float("nan"))
        assert nonfinite(broken).tolist() == [float(i == j) for j in range(4)]
