"""What a process frees it can take again without new pages."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from support import REPOSITORY

PROGRAM = """
import resource
import torch
from mltfr_dist.distributed.freed_memory import keep_freed_memory
keep_freed_memory()

def step():  # 64 MiB, all freed at its end
    return sum(float(part[0]) for part in [torch.empty(1 << 21).fill_(1) for _ in range(8)])

step()
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment: str) -> int:
    """New pages of ten steps."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    clean.pop("GLIBC_TUNABLES", None)
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=REPOSITORY, env=clean | environment, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="it is glibc that is told")
def test_freed_memory_is_taken_again() -> None:
    assert faults() * 10 < faults(MALLOC_TRIM_THRESHOLD_="65536")  # the environment comes first
