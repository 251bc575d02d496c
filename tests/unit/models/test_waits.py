"""Where a pass asks the device for a number, and so waits for it: each place, and why.

On the CPU nothing waits; the operators are those that wait on a GPU.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from support import new_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mltfr_dist
from mltfr_dist.config import BackboneConfig, ExpertConfig, FilterConfig, LossConfig, MLTFRConfig
from mltfr_dist.data.batch import SequenceBatch
from mltfr_dist.models.kernels import build
from mltfr_dist.models.output import TrainingOutput

PACKAGE = Path(mltfr_dist.__file__).parent
aten = torch.ops.aten
WAITING = (
    aten.nonzero.default,
    aten._local_scalar_dense.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.equal.default,
)
NUM_TABLES = 2

BARE: dict[tuple[str, str, str], int] = {}
WITH_SHORTLIST = {
    # Whether computed scores tell the best rows apart: those that do not are looked at again.
    ("models/search.py", "_separated", "_local_scalar_dense"): NUM_TABLES,
    # Which queries have near-ties that float64 tells apart: of a shortlist on a CPU only.
    ("models/search.py", "_ordered", "nonzero"): NUM_TABLES,
    # Rows that are kept, each adapted once for all queries. Of a shortlist on a CPU only, and a GPU
    # forms them by `unique`: test_gpu_step.
    ("models/selectors/base.py", "those_kept", "nonzero"): NUM_TABLES,
}
EXACT = WITH_SHORTLIST | {
    # Rows that may be among the best where fp32 leaves doubt, each scored in float64 once.
    ("models/search.py", "_cosines", "_unique2"): NUM_TABLES,
}


class Waits(TorchDispatchMode):
    """Counts the operators by file, function and name; an index by booleans is a nonzero."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        by_mask = func in (aten.index.Tensor, aten.index_put_.default) and any(
            isinstance(index, Tensor) and index.dtype == torch.bool for index in args[1]
        )
        if func in WAITING or by_mask:
            name = "nonzero" if by_mask else func.overloadpacket.__name__
            self.found[(*running(), name)] += 1
        return func(*args, **(kwargs or {}))


def running() -> tuple[str, str]:
    """File and function of the package that are running."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(PACKAGE):
            return path.relative_to(PACKAGE).as_posix(), frame.f_code.co_name
        frame = frame.f_back
    return "elsewhere", ""


def waits(shortlist: int | None, *, enabled: bool) -> dict[tuple[str, str, str], int]:
    """Of one forward and backward pass."""
    torch.manual_seed(0)
    mltfr = MLTFRConfig(
        tables=tuple(f"tables/{m}" for m in range(NUM_TABLES)),
        filter=FilterConfig(top_k=3, shortlist_size=shortlist),
        expert=ExpertConfig(num_heads=2, head_dim=4, dropout=0.0),
    )
    backbone = BackboneConfig(hidden_dim=16, num_layers=2, num_heads=2, dropout=0.0)
    model = new_model(
        backbone,
        mltfr if enabled else MLTFRConfig(enabled=False),
        LossConfig(),
        num_items=20,
        max_len=6,
        table_rows=[torch.randn(60, 12) for _ in range(NUM_TABLES * enabled)],
    )
    model.train()
    # Shortest first, which leaves the rows in one part, as on a GPU.
    item_ids = torch.tensor([[1, 2, 0, 0, 0, 0], [3, 4, 5, 0, 0, 0], [6, 7, 8, 9, 10, 11]])
    batch = SequenceBatch(item_ids, (item_ids + 1) * (item_ids > 0), torch.arange(3)).counted()
    with Waits() as counted:
        output = model(batch)
        assert isinstance(output, TrainingOutput)
        output.terms["loss"].sum.backward()
    return dict(counted.found)


@pytest.mark.parametrize(
    ("enabled", "shortlist", "expected"),
    [(False, None, BARE), (True, 40, WITH_SHORTLIST), (True, None, EXACT)],
    ids=["bare", "shortlist", "exact"],
)
def test_a_pass_waits_where_it_must(
    enabled: bool,
    shortlist: int | None,
    expected: dict[tuple[str, str, str], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "library", lambda: None)  # kernels are for the CPU alone
    assert waits(shortlist, enabled=enabled) == expected
