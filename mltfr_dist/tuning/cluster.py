"""Ray under a sweep: one of its own on this machine, or a cluster that is there."""

from __future__ import annotations

import logging
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mltfr_dist.config import RunConfig
from mltfr_dist.errors import ConfigError
from mltfr_dist.progress import duration, say
from mltfr_dist.tuning.checks import check_inputs, check_resources
from mltfr_dist.tuning.own_ray import start_own_ray
from mltfr_dist.tuning.ray_watch import quieten, ray_watched, take_signals_again
from mltfr_dist.tuning.space import SweepConfig

JOIN_SECONDS = 300.0
"""How long a cluster may take to come up."""

PROBE_SECONDS = 90.0
"""How long a first connection to a cluster may take."""


@dataclass(frozen=True)
class Cluster:
    """Where trials run."""

    resources: dict[str, float]
    own: bool
    """Whether it is our own, on this machine: its processes have our environment."""

    def concurrent(self, sweep: SweepConfig) -> int:
        """Trials that run at a time."""
        each = sweep.resources_per_trial
        fits = int(self.resources.get("CPU", 0) // (each.workers * each.cpus))
        if each.gpus:
            fits = min(fits, int(self.resources.get("GPU", 0) / (each.workers * each.gpus)))
        return min(fits, sweep.max_concurrent or fits)


@contextmanager
def ray_cluster(
    sweep: SweepConfig, base: RunConfig, address: str | None, nodes: int
) -> Iterator[Cluster]:
    """A running Ray: without dashboard and usage statistics, on loopback where it is our own.

    Args:
        sweep: The sweep.
        base: What its trials start from.
        address: Of a cluster that is there or coming up; None: one of our own on this machine.
        nodes: Nodes that the cluster shall have before the sweep begins.

    Raises:
        ConfigError: No cluster of so many nodes comes up at ``address``, or it cannot hold a trial.
    """
    quieten()
    if address is None:
        start_own_ray()
    else:
        join(address, nodes)
    take_signals_again()
    logging.getLogger("ray.tune").setLevel(
        logging.CRITICAL
    )  # a trial's error is told once, in its own words
    try:
        cluster = Cluster(ray.cluster_resources(), own=address is None)
        check_resources(sweep, cluster.resources)
        verify_on_nodes(sweep, base)
        with ray_watched():
            yield cluster
    finally:
        ray.shutdown()


def join(address: str, nodes: int) -> None:
    """Connect to a cluster, once it has its nodes.

    Raises:
        ConfigError: It refuses us, or has not its nodes within :data:`JOIN_SECONDS`.
    """
    began, there, last = time.monotonic(), 0, ""
    said = began
    while time.monotonic() - began < JOIN_SECONDS:
        if not ray.is_initialized() and answers(address):
            last = refusal(address)
            if not last:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        if ray.is_initialized():
            there = sum(node["Alive"] for node in ray.nodes())
            if there >= nodes:
                return
        if time.monotonic() - said > 10:
            said = time.monotonic()
            say(
                f"  the Ray cluster at {address} has {there} of {nodes} nodes, waiting for up to "
                f"{duration(JOIN_SECONDS - (said - began))}"
            )
        time.sleep(1)
    raise ConfigError(
        f"The Ray cluster at {address} has {there} of {nodes} nodes after {JOIN_SECONDS:.0f} s"
        f"{f' ({last})' if last else ''}.",
        rule="A sweep begins once every node is there.",
        remedy="See the log of each node's `ray start` (slurm/sweep.sbatch: ray-NODE.log), or "
        "leave --address out for one on "
        "this machine.",
    )


def answers(address: str) -> bool:
    """Whether anything listens at ``host:port``.

    Raises:
        ConfigError: The address is none, or its host is not known.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(
            f"--address {address} is not understood.",
            rule="It is HOST:PORT.",
            remedy="Give the head's address.",
        )
    try:
        with socket.create_connection((host, int(port)), timeout=5):
            return True
    except socket.gaierror as error:
        raise ConfigError(
            f"--address {address}: there is no host {host} ({error.strerror}).",
            remedy="Give the head's address.",
        ) from None
    except OSError:
        return False


PROBE = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, logging_level=40)"


def refusal(address: str) -> str:
    """Why this process cannot connect to what listens at ``address``, where waiting may help; else
    empty.

    Asked in a process of its own: Ray tries for minutes what it cannot connect to, and then ends
    the process.

    Raises:
        ConfigError: Waiting does not help.
    """
    with tempfile.TemporaryFile("w+") as output:
        command = [sys.executable, "-c", PROBE, address]
        process = subprocess.Popen(command, stdout=output, stderr=output)
        deadline, text = time.monotonic() + PROBE_SECONDS, ""
        try:
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.2)
                text = Path(f"/proc/self/fd/{output.fileno()}").read_text(errors="replace")
                if "Unauthenticated" in text:
                    raise wrong_token(address)
        finally:
            process.kill()
            code = process.wait()
        text = Path(f"/proc/self/fd/{output.fileno()}").read_text(errors="replace")
    if code == 0:
        return ""
    if "Unauthenticated" in text:
        raise wrong_token(address)
    if "ersion mismatch" in text:
        here = f"Ray {ray.__version__}, Python {sys.version.split()[0]}"
        theirs = [line.strip() for line in text.splitlines() if re.match(r" +(Ray|Python): ", line)]
        raise ConfigError(
            f"The Ray cluster at {address} runs {', '.join(theirs[:2])}; here is {here}.",
            rule="A sweep and its cluster run the same releases of Ray and Python.",
            remedy="Start the cluster and the sweep from the same environment.",
        )
    if time.monotonic() > deadline:
        raise ConfigError(
            f"What listens at {address} does not answer as a Ray cluster within "
            f"{PROBE_SECONDS:.0f} s.",
            rule="--address is that of a cluster's head, which `ray start` prints there.",
            remedy="Give that, or leave --address out for a Ray on this machine.",
        )
    lines = [line for line in text.splitlines() if line.strip()] or [f"exit code {code}"]
    return lines[-1].strip()[:200]


def wrong_token(address: str) -> ConfigError:
    """The error for a cluster with a token that is not ours."""
    return ConfigError(
        f"The Ray cluster at {address} wants another token.",
        rule="Only processes that hold a cluster's token may speak to it.",
        remedy="Set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to the file that the cluster was "
        "started with.",
    )


def verify_on_nodes(sweep: SweepConfig, base: RunConfig) -> None:
    """Compare data and tables with their recorded hashes on every other node, as was done on this
    one.

    Raises:
        MltfrError: As :func:`~mltfr_dist.tuning.checks.check_inputs`, on any of them.
    """
    here, directory = ray.get_runtime_context().get_node_id(), Path.cwd()

    def verify() -> None:
        os.chdir(directory)
        check_inputs(sweep, base)

    task = ray.remote(num_cpus=0)(verify)
    others = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    pending = [
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
        for node in others
    ]
    try:
        ray.get(pending)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
