"""Joining a Ray cluster: what is wrong is said in time."""

from __future__ import annotations

import socket

import pytest

from mltfr_dist.errors import ConfigError
from mltfr_dist.tuning import cluster


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
