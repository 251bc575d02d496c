"""Two hosts on one machine: network namespaces joined by a cable (veth), with a real two-node DeepSpeed job over TCP."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import (
    REPOSITORY,
    clean_environment,
    missing_for_nodes,
    read_lines,
    run_ranks,
    tiny_config,
)

from mltfr_dist.config import RunConfig
from mltfr_dist.errors import EXIT_LOST
from mltfr_dist.training.run_folder import dump_config, load_result

HANG_SECONDS = 25
NAMES = tuple(f"mltfr{os.getpid()}{host}" for host in "ab")
ADDRESSES = ("10.231.0.1", "10.231.0.2")
CABLE = ("cablea", "cableb")


pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(bool(missing_for_nodes()), reason=missing_for_nodes()),
    pytest.mark.timeout(900),
]


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two namespaces that see each other, and nothing else."""
    for name in NAMES:
        made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"network namespaces cannot be made here: {made.stderr.strip()}")
    try:
        ip(
            "link",
            "add",
            CABLE[0],
            "netns",
            NAMES[0],
            "type",
            "veth",
            "peer",
            "name",
            CABLE[1],
            "netns",
            NAMES[1],
        )
        for name, end, address in zip(NAMES, CABLE, ADDRESSES, strict=True):
            ip("-netns", name, "address", "add", f"{address}/24", "dev", end)
            ip("-netns", name, "link", "set", end, "up")
            ip("-netns", name, "link", "set", "lo", "up")
        yield NAMES
    finally:
        for name in NAMES:
            for pid in subprocess.run(
                ["ip", "netns", "pids", name], capture_output=True, text=True
            ).stdout.split():
                os.kill(int(pid), signal.SIGKILL)
            ip("netns", "delete", name)


def start_nodes(
    hosts: tuple[str, str], config: RunConfig, folder: Path
) -> list[subprocess.Popen[bytes]]:
    """One process of DeepSpeed's launcher on each host, as its runner starts them over ssh; logs in node0.log and node1.log."""
    path = folder / f"{config.name}.yaml"
    path.write_text(dump_config(config))
    world = base64.urlsafe_b64encode(
        json.dumps({address: [0] for address in ADDRESSES}).encode()
    ).decode()
    nodes = []
    for number, (host, end) in enumerate(zip(hosts, CABLE, strict=True)):
        launcher = [
            sys.executable,
            "-m",
            "deepspeed.launcher.launch",
            f"--world_info={world}",
            f"--node_rank={number}",
        ]
        meeting = [
            f"--master_addr={ADDRESSES[0]}",
            "--master_port=29501",
        ]  # each namespace has ports of its own
        train = [str(REPOSITORY / "train.py"), "--config", str(path)]
        environment = clean_environment(DS_ACCELERATOR="cpu", GLOO_SOCKET_IFNAME=end)
        with (folder / f"node{number}.log").open("w") as log:
            command = ["ip", "netns", "exec", host, *launcher, *meeting, *train]
            nodes.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
            )
    return nodes


def end_nodes(nodes: list[subprocess.Popen[bytes]], seconds: float) -> list[int]:
    """Exit codes, if all end in time."""
    deadline = time.monotonic() + seconds
    return [node.wait(max(0.1, deadline - time.monotonic())) for node in nodes]


def logs(folder: Path) -> list[str]:
    return [(folder / f"node{number}.log").read_text() for number in (0, 1)]


def test_a_host_that_is_cut_off_stops_the_other_and_the_run_goes_on(
    hosts: tuple[str, str], tmp_path: Path
) -> None:
    settings = {
        "training__hang_seconds": HANG_SECONDS,
        "checkpoint__every_steps": 3,
        "training__consensus_epochs": 1,
    }
    whole = tiny_config(tmp_path, name="whole", **settings)
    (tmp_path / "whole.yaml").write_text(dump_config(whole))
    run_ranks(2, REPOSITORY / "train.py", "--config", str(tmp_path / "whole.yaml"))

    config = tiny_config(tmp_path, name="cut", **settings)
    nodes = start_nodes(hosts, config, tmp_path)
    metrics = config.folder / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 4):
        assert all(node.poll() is None for node in nodes), logs(tmp_path)
        assert time.monotonic() < deadline, logs(tmp_path)
        time.sleep(0.005)
    ip("-netns", hosts[1], "link", "set", CABLE[1], "down")
    codes = end_nodes(nodes, HANG_SECONDS + 60)
    assert codes == [EXIT_LOST, EXIT_LOST], logs(tmp_path)
    for rank, log in enumerate(logs(tmp_path)):
        assert f"Rank {rank} on " in log
        assert (
            f"no progress for {HANG_SECONDS} s; last: step " in log
            or "has lost another rank" in log
        )

    ip("-netns", hosts[1], "link", "set", CABLE[1], "up")
    nodes = start_nodes(hosts, config, tmp_path)
    assert end_nodes(nodes, 300) == [0, 0], logs(tmp_path)
    assert "going on from " in logs(tmp_path)[0]
    assert read_lines(metrics) == read_lines(whole.folder / "metrics.jsonl")
    result, expected = load_result(config.folder), load_result(whole.folder)
    assert result is not None
    assert expected is not None
    assert (result.test, result.world_size) == (expected.test, 2)
