"""Ray under a sweep: one of its own on this machine, or a cluster that is there."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ray
from ray._private import services
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mltfr_dist.config import RunConfig
from mltfr_dist.errors import ConfigError
from mltfr_dist.tuning.checks import check_inputs, check_resources
from mltfr_dist.tuning.space import SweepConfig

MOST_FOLDER_CHARACTERS = 40
"""Of Ray's folder: a socket's whole name, with Ray's own 64 characters behind it, may have 107."""

JOIN_SECONDS = 300.0
"""How long a cluster may take to come up."""


@dataclass(frozen=True)
class Cluster:
    """Where trials run."""

    resources: dict[str, float]

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
    if address is None:
        start_own_ray()
    else:
        join(address, nodes)
    logging.getLogger("ray.tune").setLevel(
        logging.CRITICAL
    )  # a trial's error is told once, in its own words
    try:
        cluster = Cluster(ray.cluster_resources())
        check_resources(sweep, cluster.resources)
        verify_on_nodes(sweep, base)
        yield cluster
    finally:
        ray.shutdown()


def start_own_ray() -> None:
    """Start Ray on this machine, in a session of its own: a signal to the sweep's group is for the sweep to take.

    Raises:
        ConfigError: It does not start.
    """
    folder = ray_folder()
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:  # else Ray would keep one in the home folder
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Ray's own daemons would end at once with a SIGTERM to the whole group (timeout, systemd, a container's stop), and the
    # sweep could not let its trials save. They still die with the sweep: the kernel sees to that.
    popen = services.ConsolePopen
    services.ConsolePopen = partial(popen, start_new_session=True)
    try:
        ray.init(
            address="local",
            num_cpus=len(os.sched_getaffinity(0)),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=str(folder),
        )
    except (
        Exception
    ) as error:  # Ray raises what it likes: OSError, RuntimeError, ValueError, its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0]
        raise ConfigError(
            f"Ray does not start on this machine: {reason.rstrip('.')}.",
            rule=f"It needs room in {folder} and in /dev/shm.",
            remedy="Set TMPDIR to a folder with room, or give the address of a cluster by --address HOST:PORT.",
        ) from None
    finally:
        services.ConsolePopen = popen


def ray_folder() -> Path:
    """Where Ray keeps its files: the usual temporary folder, or a short one where that makes its sockets' names too long.

    Raises:
        ConfigError: None of them can be written.
    """
    usual = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray"
    for folder in (usual, Path("/tmp/ray"), Path(f"/tmp/ray-{os.getuid()}"), Path("/dev/shm/ray")):
        parent = folder if folder.exists() else folder.parent
        if len(str(folder)) <= MOST_FOLDER_CHARACTERS and os.access(parent, os.W_OK | os.X_OK):
            if folder != usual:
                print(f"Ray keeps its files in {folder}: {usual} is too long or not writable.")
            return folder
    raise ConfigError(
        f"Ray has no folder for its files: {usual} and /tmp are too long or not writable.",
        rule=f"A folder of at most {MOST_FOLDER_CHARACTERS} characters, for the names of sockets are short.",
        remedy="Set TMPDIR to such a folder.",
    )


def join(address: str, nodes: int) -> None:
    """Connect to a cluster, once it has its nodes.

    Raises:
        ConfigError: It has not within :data:`JOIN_SECONDS`.
    """
    deadline, there = time.monotonic() + JOIN_SECONDS, 0
    while time.monotonic() < deadline:
        if not ray.is_initialized() and answers(address):  # Ray itself would try for minutes
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        if ray.is_initialized():
            there = sum(node["Alive"] for node in ray.nodes())
            if there >= nodes:
                return
        time.sleep(1)
    raise ConfigError(
        f"The Ray cluster at {address} has {there} of {nodes} nodes after {JOIN_SECONDS:.0f} s.",
        rule="A sweep begins once every node is there.",
        remedy="See the log of each node's `ray start` (slurm/sweep.sbatch: ray-NODE.log), or leave --address out for one on "
        "this machine.",
    )


def answers(address: str) -> bool:
    """Whether anything listens at ``host:port``.

    Raises:
        ConfigError: The address is none.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(
            f"--address {address} is not understood.",
            rule="It is HOST:PORT.",
            remedy="Give the head's address.",
        )
    try:
        with socket.create_connection((host, int(port)), timeout=5):
            return True
    except OSError:
        return False


def verify_on_nodes(sweep: SweepConfig, base: RunConfig) -> None:
    """Compare data and tables with their recorded hashes on every other node, as was done on this one.

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
