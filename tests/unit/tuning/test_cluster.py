"""Joining a Ray cluster: what is wrong is said in time."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from mltfr_dist.errors import ConfigError
from mltfr_dist.tuning import cluster
from mltfr_dist.tuning.own_ray import MIN_FREE, ray_folder, unusable

ROOT = Path(__file__).parents[3]


def test_a_cluster_that_does_not_come_up_is_told_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "JOIN_SECONDS", 2.0)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        with pytest.raises(
            ConfigError, match=rf"The Ray cluster at 127.0.0.1:{port} has 0 of 3 nodes after 2 s"
        ):
            cluster.join(f"127.0.0.1:{port}", 3)


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "head:ray"])
def test_an_address_is_host_and_port(address: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        cluster.join(address, 1)


def test_rays_folder_is_short_enough_for_its_sockets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    assert ray_folder() == Path("/tmp/ray")
    assert not capsys.readouterr().out
    long = tmp_path / ("x" * 60)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    assert len(str(ray_folder())) <= 40
    assert f"{long}/ray is too long" in capsys.readouterr().out


def test_a_host_that_is_not_there_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"there is no host nowhere\.invalid"):
        cluster.join("nowhere.invalid:6379", 1)


def test_a_full_temporary_folder_is_told_before_ray_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    place = Path(tempfile.mkdtemp(prefix="r-", dir="/tmp"))
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        place.rmdir()
        pytest.skip("no file system can be mounted here")
    try:
        monkeypatch.setattr("tempfile.tempdir", str(place))
        assert unusable(place / "ray") == "has 1 MiB free"
        assert ray_folder() == Path("/tmp/ray")
        assert f"{place}/ray has 1 MiB free" in capsys.readouterr().out
        monkeypatch.setattr("mltfr_dist.tuning.own_ray.MIN_FREE", 1 << 60)
        with pytest.raises(ConfigError, match="Ray has no folder for its files"):
            ray_folder()
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)
        place.rmdir()


def test_a_folder_that_cannot_be_written_is_told() -> None:
    assert unusable(Path("/proc/ray")).startswith("cannot be written")
    assert MIN_FREE < 2**30


def start_ray(**variables: str) -> str:
    """Start a real Ray in a process of its own; returns what that says."""
    code = (
        "from mltfr_dist.tuning.environment import LOOPBACK, set_environment\n"
        "set_environment(LOOPBACK)\n"
        "from mltfr_dist.errors import MltfrError\n"
        "from mltfr_dist.tuning.own_ray import start_own_ray\n"
        "try:\n    start_own_ray()\n    print('started')\n"
        "except MltfrError as error:\n    print(error)\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=environment | variables, cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert "Traceback" not in done.stdout + done.stderr
    return done.stdout.strip()


def test_a_ray_that_does_not_start_is_one_paragraph() -> None:
    text = start_ray(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH="/nowhere/token")
    assert text.startswith("Ray does not start on this machine: RAY_AUTH_TOKEN_PATH is set")
    assert "--address HOST:PORT" in text
    assert "\n" not in text


def test_ray_starts_without_a_home_that_it_can_write() -> None:
    assert start_ray(HOME="/proc") == "started"
