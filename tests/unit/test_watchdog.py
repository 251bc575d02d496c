"""Time in which a rank, or one that it waits for, was stopped is not time in which it was stuck."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import clean_environment

from mltfr_dist.distributed.processes import Seen, own_process
from mltfr_dist.errors import EXIT_LOST

RANK = """
import sys, time
from mltfr_dist.distributed import watchdog
from mltfr_dist.distributed.processes import Seen, own_process
watchdog.LINGER_SECONDS = 0.1
seconds, neighbour = float(sys.argv[1]), [int(n) for n in sys.argv[2:]]
with watchdog.watched(0, 2.0):
    watchdog.heartbeat("step 7")
    if neighbour:
        watchdog.watch_with({1: Seen(*neighbour)})
    print(own_process().born, flush=True)
    end = time.monotonic() + abs(seconds)
    while time.monotonic() < end:
        time.sleep(0.1)
        if seconds > 0:
            watchdog.heartbeat()
print("done")
"""


@pytest.fixture
def rank() -> Iterator[Callable[..., tuple[subprocess.Popen[str], int]]]:
    """Starts a watched process of 2 s patience that goes on, or for negative seconds is stuck."""
    started = []

    def start(seconds: float, *neighbour: int) -> tuple[subprocess.Popen[str], int]:
        process = subprocess.Popen(
            [sys.executable, "-c", RANK, str(seconds), *map(str, neighbour)],
            env=clean_environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        return process, int(process.stdout.readline())

    yield start
    for process in started:
        process.kill()
        process.wait()


def stop_for(process: subprocess.Popen[str], seconds: float) -> None:
    process.send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    process.send_signal(signal.SIGCONT)


def test_a_stuck_rank_ends_with_its_trace(
    rank: Callable[..., tuple[subprocess.Popen[str], int]],
) -> None:
    process, _ = rank(-60)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == EXIT_LOST
    assert "no progress for 2 s; last: step 7" in stderr
    assert "in <module>" in stderr


def test_a_stopped_rank_goes_on(rank: Callable[..., tuple[subprocess.Popen[str], int]]) -> None:
    process, _ = rank(6)
    stop_for(process, 5)
    stdout, stderr = process.communicate(timeout=30)
    assert (process.returncode, stdout, stderr) == (0, "done\n", "")


def test_a_stuck_rank_that_was_stopped_ends_all_the_same(
    rank: Callable[..., tuple[subprocess.Popen[str], int]],
) -> None:
    process, _ = rank(-60)
    time.sleep(0.5)
    stop_for(process, 4)
    assert process.poll() is None
    process.communicate(timeout=30)
    assert process.returncode == EXIT_LOST


def test_a_rank_waits_for_a_neighbour_that_is_stopped_and_no_longer(
    rank: Callable[..., tuple[subprocess.Popen[str], int]],
) -> None:
    neighbour, born = rank(60)
    waiting, _ = rank(-60, neighbour.pid, born)
    stop_for(neighbour, 6)
    assert waiting.poll() is None, "its neighbour was stopped, so it was not stuck"
    _, stderr = waiting.communicate(timeout=30)
    assert waiting.returncode == EXIT_LOST, "the neighbour goes on, and yet nothing comes"
    assert stderr.count(f"waits for rank 1, process {neighbour.pid} of the same machine") == 1
    assert f"`kill -CONT {neighbour.pid}`" in stderr


def test_a_dead_neighbour_is_not_a_stopped_one(
    rank: Callable[..., tuple[subprocess.Popen[str], int]],
) -> None:
    neighbour, born = rank(60)
    neighbour.kill()
    waiting, _ = rank(-60, neighbour.pid, born)
    waiting.communicate(timeout=30)
    assert waiting.returncode == EXIT_LOST


def test_this_process_is_seen_by_its_birth() -> None:
    assert own_process().state == "R"
    assert not Seen(own_process().pid, own_process().born + 1).state
    assert Path(f"/proc/{own_process().pid}").exists()
