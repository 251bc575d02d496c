"""Ranks of one machine add through memory that they share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import REPOSITORY, clean_environment, run_ranks, tiny_config

from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.models.kernels.build import library

WORKER = Path(__file__).parent / "sharing_worker.py"
needs_kernels = pytest.mark.skipif(library() is None, reason="no compiler, or no AVX2")


@contextmanager
def sharing(plan: str, world_size: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes of one memory, killed at the end."""
    file = os.memfd_create("test")
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, str(file), str(rank), str(world_size), plan],
            env=clean_environment() | {"PYTHONPATH": str(REPOSITORY)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[file],
        )
        for rank in range(world_size)
    ]
    os.close(file)
    try:
        for process in processes:
            assert first_line(process) == "ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


@needs_kernels
@pytest.mark.parametrize("world_size", [2, 3])
def test_messages_of_all_kinds(world_size: int) -> None:
    with sharing("messages", world_size) as processes:
        printed = [process.communicate(timeout=120)[0] for process in processes]
        assert [process.returncode for process in processes] == [0] * world_size
    assert printed[0]
    assert len(set(printed)) == 1, "every rank has the same bits"


@needs_kernels
def test_a_rank_that_is_stopped_is_waited_for_and_one_that_has_ended_is_not() -> None:
    with sharing("until_lost", 3) as (first, second, last):
        for process in (first, second, last):
            assert first_line(process) == "added\n"
        last.send_signal(signal.SIGSTOP)
        time.sleep(1.0)
        assert first.poll() is None
        assert second.poll() is None
        last.kill()  # its parent has not asked yet: a zombie, and no less gone
        for process in (first, second):
            said = first_line(process)
            assert said.startswith("the process of rank 2 on this machine has ended; after ")


@needs_kernels
def test_messages_that_differ_are_no_sum() -> None:
    with sharing("differing", 2) as processes:
        for process in processes:
            said = first_line(process)
            assert said == "the ranks of this machine have come with messages that differ\n"


def test_what_memory_does_not_take_goes_the_other_way() -> None:
    from mltfr_dist.distributed.shared_memory import SharedMemory

    takes = SharedMemory.takes
    nobody = SharedMemory.__new__(SharedMemory)
    assert takes(nobody, [torch.ones(1)], dist.ReduceOp.SUM)
    assert not takes(nobody, [torch.ones(1).half()], dist.ReduceOp.SUM)
    assert not takes(nobody, [torch.ones(1)], dist.ReduceOp.MIN)
    alone = Ranks(0, 1, torch.device("cpu"))
    assert alone.sum(torch.ones(2)).tolist() == [1, 1]


@pytest.mark.integration
@needs_kernels
def test_a_step_is_the_same_with_and_without(tmp_path: Path) -> None:
    tiny_config(tmp_path)  # writes the data, which one process does
    printed = run_ranks(2, Path(__file__).parent / "shared_step_worker.py", str(tmp_path))
    assert printed.count("equal to the bit") == 2, printed


@pytest.mark.integration
@needs_kernels
def test_ranks_that_cannot_share_say_so_and_go_on() -> None:
    printed = run_ranks(2, Path(__file__).parent / "shared_step_worker.py", "refused")
    assert printed.count("cannot share memory and exchange their sums by gloo, and slower: ") == 1
    assert "fd/none (not here)" in printed
