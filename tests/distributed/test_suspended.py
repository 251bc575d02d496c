"""Ranks that are stopped for longer than `training.hang_seconds`, and go on, end no run."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
from support import REPOSITORY, clean_environment, tiny_config, torchrun

from mltfr_dist.training.run_folder import dump_config, load_result

HANG_SECONDS = 12


def rank_processes(place: Path) -> list[int]:
    """Process ids of the two ranks, in order."""
    pids = subprocess.run(["pgrep", "-f", str(place)], capture_output=True, text=True).stdout
    result = {}
    for pid in pids.split():
        environment = Path(f"/proc/{pid}/environ").read_text()
        for rank in (0, 1):
            if f"\0RANK={rank}\0" in environment:
                result[rank] = int(pid)
    return [result[rank] for rank in (0, 1)]


@pytest.mark.integration
@pytest.mark.timeout(600)
def test_one_rank_and_then_all_are_stopped_and_the_run_goes_on(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, training__hang_seconds=HANG_SECONDS, training__epochs=40)
    place = tmp_path / "suspended.yaml"
    place.write_text(dump_config(config))
    process = subprocess.Popen(
        torchrun(2, REPOSITORY / "train.py", "--config", str(place)),
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 200
    while not list((config.folder / "checkpoints").glob("train-step*")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ranks = rank_processes(place)
    for stopped in ([1], [0], [0, 1]):
        for which in stopped:
            os.kill(ranks[which], signal.SIGSTOP)
        time.sleep(HANG_SECONDS + 8)
        assert process.poll() is None, "it was only suspended"
        for which in stopped:
            os.kill(ranks[which], signal.SIGCONT)
        time.sleep(1)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    assert f"Rank 0 waits for rank 1, process {ranks[1]}" in stderr
    assert f"Rank 1 waits for rank 0, process {ranks[0]}" in stderr
    assert "no progress" not in stderr
    assert load_result(config.folder) is not None
