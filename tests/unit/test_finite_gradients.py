"""A gradient that is not finite is seen, whichever number it is."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from mltfr_dist.distributed import health as health_module
from mltfr_dist.distributed.health import Health
from mltfr_dist.distributed.ranks import ALONE
from mltfr_dist.models.kernels import nonfinite
from mltfr_dist.numerics import norms

SIZE = 101


@pytest.fixture(params=["as on a CPU", "as on a GPU", "as on a GPU that is full"])
def held(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int | None:
    """Bytes of gradients that are looked at together; None: each by itself."""
    if request.param == "as on a CPU":
        return None
    monkeypatch.setattr(health_module, "_magnitudes", partial(norms, order=torch.inf))
    monkeypatch.setattr(health_module, "nonfinite", lambda grads: None)
    return 1 << 20 if request.param == "as on a GPU" else SIZE


@pytest.mark.parametrize("keeps_gradients", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_number_of_a_gradient_is_enough(
    dtype: torch.dtype, bad: float, keeps_gradients: bool, held: int | None
) -> None:
    module = nn.ParameterDict({name: torch.ones(SIZE, dtype=dtype) for name in ("good", "bad")})
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    health = Health(module, optimizer, ALONE, keeps_gradients=keeps_gradients)
    if held is not None:
        health._most_held = held
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


@pytest.mark.parametrize("order", [2.0, torch.inf])
def test_norms_of_several_tensors_are_those_of_each(order: float) -> None:
    """In any formats, of any shapes, none at all among them."""
    torch.manual_seed(0)
    formats = (torch.float32, torch.bfloat16, torch.float64)
    tensors = [torch.randn(n, 3).to(dtype) for n in (1, 70, 5_000) for dtype in formats]
    made = norms([*tensors, torch.zeros(0)], order)
    expected = [torch.linalg.vector_norm(t.double(), ord=order).float() for t in tensors]
    expected.append(torch.zeros(()))
    torch.testing.assert_close(torch.stack(made), torch.stack(expected), rtol=1e-5, atol=0)
    assert norms([]) == []
