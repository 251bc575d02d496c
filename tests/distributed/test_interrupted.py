"""A run that is killed and started again ends where the uninterrupted one does: same losses, same
metrics.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support import REPOSITORY, clean_environment, read_lines, tiny_config, torchrun

from mltfr_dist.config import RunConfig
from mltfr_dist.training.run_folder import dump_config, load_result

TRAIN = REPOSITORY / "train.py"


def command(config: RunConfig, place: Path) -> list[str]:
    place.write_text(dump_config(config))
    return torchrun(2, TRAIN, "--config", str(place))


def run_to_the_end(config: RunConfig, place: Path) -> None:
    done = subprocess.run(
        command(config, place), env=clean_environment(), capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]


def kill_at(config: RunConfig, place: Path, num_lines: int) -> None:
    """Start the run and SIGKILL launcher and ranks once metrics.jsonl has that many lines."""
    metrics = config.folder / "metrics.jsonl"
    with (place.parent / "killed.log").open("w") as log:
        process = subprocess.Popen(
            command(config, place),
            env=clean_environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        deadline = time.monotonic() + 120
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= num_lines):
            assert process.poll() is None, f"ended before it could be killed: {log.name}"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGKILL)
        ranks = subprocess.run(
            ["pgrep", "-f", str(place)], capture_output=True, text=True
        ).stdout.split()
        for rank in ranks:
            os.kill(int(rank), signal.SIGKILL)  # torchrun gives each rank a session of its own
        process.wait()
    time.sleep(0.2)


def comparable(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


ROWS = {"optimizer__item_gradients": "sparse", "loss__name": "gbce", "training__precision": "bf16"}

MEANWHILE = {"item_table__placement": "rows", "checkpoint__background": True}


@pytest.mark.integration
@pytest.mark.parametrize(
    "changes",
    [{}, ROWS, MEANWHILE],
    ids=["dense", "sparse item gradients in bf16", "divided items, saved in the background"],
)
def test_killed_run_resumes_to_the_same_trace(tmp_path: Path, changes: dict[str, Any]) -> None:
    # Two steps between checkpoints: most kills lose work, so the trace is only whole if it is made
    # again exactly.
    changes = changes | {
        "checkpoint__every_steps": 2,
        "deepspeed": str(REPOSITORY / "ds_configs" / "zero2.json"),
    }
    whole = tiny_config(tmp_path, **changes)
    run_to_the_end(whole, tmp_path / "whole.yaml")
    expected = read_lines(whole.folder / "metrics.jsonl")
    last_train = max(i for i, line in enumerate(expected) if line["stage"] == "train")

    killed = tiny_config(tmp_path, name="killed", **changes)
    rng = random.Random()
    places = sorted(
        [rng.randint(1, last_train), rng.randint(last_train + 2, len(expected) - 3)]
    )  # one kill in each stage
    print(f"killed after {places} of {len(expected)} lines")
    for place in places:
        kill_at(killed, tmp_path / "killed.yaml", place)
    run_to_the_end(killed, tmp_path / "killed.yaml")

    assert comparable(read_lines(killed.folder / "metrics.jsonl")) == comparable(expected), (
        f"killed after {places}"
    )
    first, second = load_result(whole.folder), load_result(killed.folder)
    assert first is not None
    assert second is not None
    assert (second.test, second.valid, second.stage, second.epoch) == (
        first.test,
        first.valid,
        first.stage,
        first.epoch,
    )
    assert not list((killed.folder / "checkpoints").glob(".partial-*"))


@pytest.mark.integration
def test_all_launchers_give_the_same_run(tmp_path: Path) -> None:
    """`deepspeed train.py` on 2 ranks, and `python train.py` alone, end with the metrics of
    torchrun's 2 ranks.
    """
    results = {}
    for name in ("torchrun", "deepspeed", "python"):
        config = tiny_config(
            tmp_path,
            name=name,
            training__consensus_epochs=1,
            baselines=("popularity", "item_knn", "backbone"),
        )
        place = tmp_path / f"{name}.yaml"
        place.write_text(dump_config(config))
        arguments = [str(TRAIN), "--config", str(place)]
        environment = clean_environment(DS_ACCELERATOR="cpu")
        start = {
            "torchrun": torchrun(2, TRAIN, *arguments[1:]),
            "deepspeed": [
                str(Path(sys.executable).parent / "deepspeed"),
                "--num_gpus",
                "2",
                "--master_port",
                free_port(),
                *arguments,
            ],
            "python": [sys.executable, *arguments],
        }[name]
        done = subprocess.run(
            start, env=environment, capture_output=True, text=True, timeout=240, cwd=tmp_path
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
        results[name] = load_result(config.folder)
        for line in ("popularity", "item_knn", "sasrec ", "sasrec + MLTFR"):
            assert line in done.stdout, f"{name} printed no row for {line}"
        assert done.stdout.count("test HR@10") == 1, "only rank 0 may speak"
        for file in (
            "config.yaml",
            "metrics.jsonl",
            "report.md",
            "result.json",
            "tb",
            "checkpoints",
            "backbone/config.yaml",
        ):
            assert (config.folder / file).exists(), file
    assert results["torchrun"].test == pytest.approx(results["deepspeed"].test, rel=1e-9)
    # Dropout masks belong to ranks, so one rank trains a (slightly) different model.
    assert results["python"].world_size == 1
    assert results["deepspeed"].world_size == 2


def free_port() -> str:
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])
