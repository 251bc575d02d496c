"""A run that is asked to stop saves at a step that its ranks agree on, and goes on at any number of
ranks.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from support import REPOSITORY, clean_environment, read_lines, tiny_config, torchrun

from mltfr_dist.config import RunConfig
from mltfr_dist.distributed import checkpoint, kept
from mltfr_dist.errors import EXIT_STOPPED
from mltfr_dist.training.run_folder import dump_config

TRAIN = REPOSITORY / "train.py"
NO_DROPOUT = {
    "backbone__dropout": 0.0,
    "mltfr__expert__dropout": 0.0,
    "training__epochs": 4,
    "training__patience": 9,
}


def start(config: RunConfig, tmp_path: Path, num_ranks: int) -> subprocess.Popen[str]:
    place = tmp_path / f"{config.name}.yaml"
    place.write_text(dump_config(config))
    command = torchrun(num_ranks, TRAIN, "--config", str(place))
    return subprocess.Popen(
        command, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def end(process: subprocess.Popen[str]) -> tuple[str, str]:
    stdout, stderr = process.communicate(timeout=240)
    return stdout, stderr


def rank_process(config: RunConfig, tmp_path: Path, rank: int) -> int:
    """Process id of a rank."""
    pids = subprocess.run(
        ["pgrep", "-f", str(tmp_path / f"{config.name}.yaml")], capture_output=True, text=True
    ).stdout.split()
    result = [pid for pid in pids if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text()]
    return int(result[0])


def losses(config: RunConfig) -> list[tuple[Any, ...]]:
    lines = read_lines(config.folder / "metrics.jsonl")
    return [(line["stage"], line["step"], line["loss"]) for line in lines if line["kind"] == "step"]


@pytest.mark.integration
def test_one_rank_is_asked_and_the_run_goes_on_at_other_world_sizes(tmp_path: Path) -> None:
    whole = tiny_config(tmp_path, name="whole", **NO_DROPOUT)
    _, stderr = end(process := start(whole, tmp_path, 2))
    assert process.returncode == 0, stderr

    stopped = tiny_config(tmp_path, name="stopped", **NO_DROPOUT)
    process = start(stopped, tmp_path, 2)
    metrics = stopped.folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        assert process.poll() is None, end(process)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(rank_process(stopped, tmp_path, 1), signal.SIGUSR1)
    _, stderr = end(process)
    assert stderr.count("StoppedError") == 2, "one rank speaks, at once and at the end"
    assert f"exitcode  : {EXIT_STOPPED}" in stderr
    last = kept.latest(stopped.folder / "checkpoints", "train")
    assert last is not None
    step = checkpoint.read_header(last).progress.step
    if "in the midst of ranking the valid split" not in stderr:  # where the signal found it
        assert f"after step {step} of stage `train`" in stderr
    assert losses(stopped)[-1][1] == step, "nothing was lost, nothing trained after the save"

    for num_ranks in (1, 2, 4):
        again = tiny_config(tmp_path, name=f"on{num_ranks}", **NO_DROPOUT)
        shutil.copytree(stopped.folder, again.folder)
        (again.folder / "config.yaml").write_text(dump_config(again))
        stdout, stderr = end(process := start(again, tmp_path, num_ranks))
        assert process.returncode == 0, stderr
        assert f"going on from {last.name}" in stdout
        assert json.loads((again.folder / "result.json").read_text())["world_size"] == num_ranks
        assert [place[:2] for place in losses(again)] == [place[:2] for place in losses(whole)]
        differences = [
            abs(a[2] - b[2]) / b[2] for a, b in zip(losses(again), losses(whole), strict=True)
        ]
        assert max(differences) < 1e-5, f"on {num_ranks} ranks"


@pytest.mark.integration
def test_a_launcher_that_is_terminated_lets_the_run_save(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, **(NO_DROPOUT | {"training__epochs": 200}))
    process = start(config, tmp_path, 2)
    deadline = time.monotonic() + 120
    while not list((config.folder / "checkpoints").glob("train-step*")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.terminate()
    _, stderr = end(process)
    assert process.returncode != 0
    assert "SignalException" in stderr
    assert stderr.splitlines()[-1].startswith("StoppedError: "), "said last, below the launcher's"
    last = kept.latest_intact(config.folder / "checkpoints", "train", print)
    assert last is not None
    assert checkpoint.read_header(last).progress.step == losses(config)[-1][1], stderr
