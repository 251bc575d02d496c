"""Ray that does not start, refuses, dies or runs out of room under a sweep: one paragraph, and
nothing is lost.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from support import clean_environment
from test_sweep import (
    finish,
    kill_node,
    start,
    train_workers,
    valid_lines,
    wait_until,
    write_space,
)

from mltfr_dist.tuning.records import Trial, load_trials

pytestmark = pytest.mark.integration
ONE_WORKER = {"workers": 1, "cpus": 1}


def a_space(folder: Path, epochs: int, **changes: Any) -> Path:
    options = {
        "scheduler": "none",
        "final_seeds": [],
        "algorithm": "grid",
        "resources_per_trial": ONE_WORKER,
        "max_concurrent": 1,
        "overrides": {"training.epochs": epochs, "training.patience": epochs},
    }
    return write_space(folder, {"training.seed": {"choices": [0, 1]}}, **options | changes)


def free_port() -> int:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def refused(path: Path, *options: str, **variables: str) -> str:
    """Start a sweep that Ray refuses; returns its one paragraph. Nothing may be written."""
    process = start(path, *options, **variables)
    code = process.wait(timeout=280)
    text = path.with_suffix(".log").read_text()
    assert code == 2, text[-3000:]
    assert not (path.parent / "sweeps").exists(), "nothing is written"
    lines = text.splitlines()
    assert "Traceback" not in text
    assert lines[-1].startswith("ConfigError: "), text[-3000:]
    allowed = ("sweep `", "Ray keeps its files", "  the Ray cluster at", "ConfigError: ")
    assert all(line.startswith(allowed) for line in lines), text[-3000:]
    return lines[-1]


@contextmanager
def head(folder: Path, code: str = "pass") -> Iterator[str]:
    """A cluster of one node on this machine, with a token; ``code`` runs before it starts."""
    port = free_port()
    (folder / "head-token").write_text("a" * 64)
    (folder / "head-token").chmod(0o600)
    more = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "head-token")}
    ports = ("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0")
    options = ["start", "--head", f"--port={port}", "--block", "--num-cpus=1", *ports]
    options += ["--disable-usage-stats", "--include-dashboard=false"]
    main = f"import sys, ray; {code}; from ray.scripts.scripts import cli; cli({options!r})"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = clean_environment(**more)
    command = [sys.executable, "-c", main]
    node = subprocess.Popen(command, env=environment, start_new_session=True, **quiet)  # type: ignore[call-overload]
    try:
        yield f"{ray.util.get_node_ip_address()}:{port}"
    finally:
        kill_node(node)


@pytest.mark.timeout(400)
def test_a_cluster_with_another_token_is_told(tmp_path: Path) -> None:
    path = a_space(tmp_path, 3)
    ours = tmp_path / "token"
    ours.write_text("b" * 64)
    ours.chmod(0o600)
    with head(tmp_path) as address:
        mine = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(ours)}
        text = refused(path, "--address", address, **mine)
    assert f"The Ray cluster at {address} wants another token" in text
    assert "RAY_AUTH_TOKEN_PATH" in text


@pytest.mark.timeout(400)
def test_a_cluster_of_another_release_is_told(tmp_path: Path) -> None:
    path = a_space(tmp_path, 3)
    with head(tmp_path, code="ray.__version__ = '2.0.0'") as address:
        mine = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "head-token")}
        text = refused(path, "--address", address, **mine)
    assert f"The Ray cluster at {address} runs Ray: 2.0.0, Python: " in text
    assert f"here is Ray {ray.__version__}" in text


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_what_is_no_ray_is_told(tmp_path: Path) -> None:
    path = a_space(tmp_path, 3)
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        text = refused(path, "--address", address)
    assert f"What listens at {address} does not answer as a Ray cluster" in text


def killed(path: Path, folder: Path, daemon: str) -> str:
    """Kill a daemon of Ray's in the middle of a trial; returns what the sweep says then."""
    process = start(path)
    wait_until(
        process,
        path,
        lambda: bool(load_trials(folder)) and len(valid_lines(load_trials(folder)[0])) > 2,
    )
    family = psutil.Process(process.pid).children(recursive=True)
    before = path.with_suffix(".log").read_text()
    next(child for child in family if child.name() == daemon).send_signal(signal.SIGKILL)
    assert process.wait(timeout=60) == 3
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    return path.with_suffix(".log").read_text()[len(before) :]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("daemon", ["raylet", pytest.param("gcs_server", marks=pytest.mark.slow)])
def test_a_killed_ray_is_one_line_and_the_sweep_goes_on(tmp_path: Path, daemon: str) -> None:
    path = a_space(tmp_path, 40)
    folder = tmp_path / "sweeps" / "sweep"
    said = [line for line in killed(path, folder, daemon).splitlines() if "trials over" not in line]
    assert len(said) == 1, said
    assert re.match(rf"LostRankError: Ray's {daemon} \(process \d+\) was killed", said[0])
    (trial,) = load_trials(folder)
    assert trial.state == "unfinished"
    finish(path)
    assert [t.state for t in load_trials(folder)] == ["finished"] * 2
    assert "going on from train-step" in (folder / "trials" / "0000.log").read_text()


@contextmanager
def small_disk(size: str) -> Iterator[Path]:
    """A file system of that size, at a short path."""
    place = Path(tempfile.mkdtemp(prefix="r-", dir="/tmp"))
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if mount is None or os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
        place.rmdir()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_full_temporary_folder_stops_no_trial(tmp_path: Path) -> None:
    path = a_space(tmp_path, 12)
    folder = tmp_path / "sweeps" / "sweep"
    with small_disk("100m") as disk:
        process = start(path, TMPDIR=str(disk))
        wait_until(
            process,
            path,
            lambda: bool(load_trials(folder)) and len(valid_lines(load_trials(folder)[0])) > 2,
        )
        fill(disk / "fill")
        code = process.wait(timeout=300)
    text = path.with_suffix(".log").read_text()
    assert code == 0, text[-3000:]
    assert text.count(" is full: no process can start, trials go on in those that are there") == 1
    assert [t.state for t in load_trials(folder)] == ["finished"] * 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_lost_process_without_room_for_another_ends_the_sweep(tmp_path: Path) -> None:
    path = a_space(tmp_path, 40)
    folder = tmp_path / "sweeps" / "sweep"
    with small_disk("100m") as disk:
        process = start(path, TMPDIR=str(disk))
        wait_until(
            process,
            path,
            lambda: bool(load_trials(folder)) and len(valid_lines(load_trials(folder)[0])) > 2,
        )
        fill(disk / "fill")
        (worker,) = train_workers(process)
        os.kill(worker, signal.SIGKILL)
        code = process.wait(timeout=300)
    text = path.with_suffix(".log").read_text()
    assert code == 75, text[-3000:]
    assert "Traceback" not in text
    assert f"There is no room left in {disk}/ray/session" in text.splitlines()[-1]
    assert "TMPDIR" in text.splitlines()[-1]
    assert "trial 0000  stays unfinished: no room to start its process" in text
    trials: list[Trial] = load_trials(folder)
    assert trials[0].state == "unfinished"
    finish(path)
    assert [t.state for t in load_trials(folder)] == ["finished"] * 2
    assert "going on from train-step" in (folder / "trials" / "0000.log").read_text()


def fill(path: Path) -> None:
    """Leave no byte on a file system."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while file.write(b"\0" * size):
                    pass
            except OSError:
                continue
