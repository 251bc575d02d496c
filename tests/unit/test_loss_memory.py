"""What the full softmax takes beside the item table, at a size where it would show."""

from __future__ import annotations

import subprocess
import sys

import pytest
from support import clean_environment

CODE = """
import sys
import torch
from mltfr_dist.distributed.resources import peak_memory_bytes
from mltfr_dist.models.cross_entropy import full_cross_entropy
torch.manual_seed(0)
table = torch.randn(1_000_001, 64).mul_(0.1).requires_grad_()
positions = int(sys.argv[1])
hidden = torch.randn(positions, 64, requires_grad=True)
before = peak_memory_bytes()
targets, weights = torch.arange(1, positions + 1), torch.ones(positions)
full_cross_entropy(hidden, table[1:], targets, weights).backward()
print((peak_memory_bytes() - before) / 1e9)
"""


@pytest.mark.parametrize("positions", [128, pytest.param(1024, marks=pytest.mark.slow)])
def test_a_million_items_take_less_than_a_gigabyte(positions: int) -> None:
    """Logits of 64 positions, the gradient, and its copies on the way to the table (0.26 GB
    each).
    """
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(positions)],
        env=clean_environment(OMP_NUM_THREADS="2"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert 0.25 < float(done.stdout) < 1.0
