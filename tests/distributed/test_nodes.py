"""Two hosts on one machine: network namespaces joined by a cable (veth), with a real two-node
DeepSpeed job over TCP.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
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
from mltfr_dist.errors import EXIT_BAD_INPUT, EXIT_LOST
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
    """One process of DeepSpeed's launcher on each host, as its runner starts them over ssh; logs in
    node0.log and node1.log.
    """
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


WRONG = ("10.232.0.1", "10.232.0.2")
"""Addresses of a second network, which leads nowhere, and which the hosts' names stand for."""


@pytest.fixture
def two_networks(hosts: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """The two hosts, each with an interface `first` that its name stands for, and the cable as
    `fast`.
    """
    folders = [Path("/etc/netns") / name for name in hosts]
    try:
        for name, folder, end, address in zip(hosts, folders, CABLE, WRONG, strict=True):
            ip("-netns", name, "link", "add", "first", "type", "veth", "peer", "name", "nowhere")
            ip("-netns", name, "link", "set", "nowhere", "up")
            ip("-netns", name, "address", "add", f"{address}/24", "dev", "first")
            ip("-netns", name, "link", "set", "first", "up")
            ip("-netns", name, "link", "set", end, "down")
            ip("-netns", name, "link", "set", end, "name", "fast")
            ip("-netns", name, "link", "set", "fast", "up")
            folder.mkdir(
                parents=True
            )  # `ip netns exec` puts its files in the place of those in /etc
            (folder / "hosts").write_text(
                f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n"
            )
        yield hosts
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


MEET = """
from mltfr_dist.distributed import meeting
from mltfr_dist.errors import MltfrError
meeting.RENDEZVOUS_SECONDS = 15
try:
    met = meeting.start_ranks()
except MltfrError as error:
    meeting.leave(meeting.say_why(error))
met.barrier()
print(f"met {met.world_size}")
meeting.leave()
"""


def meeting_place(host: str, environment: dict[str, str]) -> list[str]:
    """Address and port at which slurm/train.sbatch lets the ranks meet."""
    functions = (
        f"sed -n '/^meeting_address() {{/,/^}}/p; /^free_port() {{/,/^}}/p' "
        f"{REPOSITORY}/slurm/job.sh"
    )
    script = f'source <({functions}); address=$(meeting_address); echo "$address $(free_port "$address")"'  # noqa: E501
    command = ["ip", "netns", "exec", host, "bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.slow
def test_the_interface_that_is_named_and_not_the_one_of_the_hosts_name(
    two_networks: tuple[str, str], tmp_path: Path
) -> None:
    named = clean_environment(
        DS_ACCELERATOR="cpu", GLOO_SOCKET_IFNAME="fast", PYTHONPATH=str(REPOSITORY)
    )
    address, port = meeting_place(two_networks[0], named)
    assert address == ADDRESSES[0]
    unnamed = {key: value for key, value in named.items() if key != "GLOO_SOCKET_IFNAME"}
    for environment, expected in ((unnamed, [EXIT_BAD_INPUT] * 2), (named, [0, 0])):
        nodes = []
        for rank, host in enumerate(two_networks):
            rendezvous = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
            rendezvous |= {"MASTER_ADDR": address, "MASTER_PORT": port}
            with (tmp_path / f"node{rank}.log").open("w") as log:
                command = ["ip", "netns", "exec", host, sys.executable, "-c", MEET]
                own = environment | rendezvous
                nodes.append(subprocess.Popen(command, env=own, stdout=log, stderr=log))
        assert end_nodes(nodes, 120) == expected, logs(tmp_path)
        said = (
            "set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME" if environment is unnamed else "met 2"
        )
        assert said in logs(tmp_path)[0]
