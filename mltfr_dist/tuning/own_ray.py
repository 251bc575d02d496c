"""A Ray of the sweep's own on this machine."""

from __future__ import annotations

import logging
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ray._private import services
from ray._private.node import Node
from ray._raylet import persist_port  # type: ignore[attr-defined]

from mltfr_dist.errors import ConfigError
from mltfr_dist.progress import say

MOST_FOLDER_CHARACTERS = 40
"""Of Ray's folder: a socket's whole name, with Ray's own 64 characters behind it, may have 107."""

MIN_FREE = 64 * 2**20
"""Bytes that Ray's folder must have free: a session's logs and state."""

OBJECT_STORE_BYTES = 128 * 2**20
"""Of memory that processes share: a sweep's send each other configurations and numbers."""

NOT_NEEDED = ("start_api_server", "start_monitor", "start_log_monitor")
"""Daemons of Ray that have nothing to do in a sweep, by the method that starts them."""

AGENTS = {"dashboard_agent_command", "runtime_env_agent_command"}
"""The raylet's options that say how its agents are started. It wants both to be there, and its own
start waits until they have imported what they need and said their ports: half of the time. Here
nobody asks them anything: there is no dashboard, and no process gets an environment of its own.
"""

STAND_IN = [sys.executable, "-I", "-S", str(Path(__file__).with_name("agent_stand_in.py"))]
"""What is started in their place."""

AGENT_PORTS = {
    "metrics_agent_port": -1,  # as an agent without a dashboard says: there is none
    "metrics_export_port": -1,
    "dashboard_agent_listen_port": -1,
    "runtime_env_agent_port": 1,  # asked for environments alone
}
"""What they would write into the session's folder."""


def start_own_ray() -> None:
    """Start Ray on this machine, in a session of its own: a signal to the sweep's group is for the
    sweep to take.

    Raises:
        ConfigError: It does not start.
    """
    folder = ray_folder()
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:  # else Ray would keep one in the home folder
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        with few_daemons():
            ray.init(
                address="local",
                num_cpus=len(os.sched_getaffinity(0)),
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=OBJECT_STORE_BYTES,
                _temp_dir=str(folder),
            )
    except Exception as error:  # Ray raises what it likes: OSError, RuntimeError, its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0]
        ray.shutdown()
        raise ConfigError(
            f"Ray does not start on this machine: {reason.rstrip('.')}.",
            rule=f"It needs room in {folder} and in /dev/shm.",
            remedy="Set TMPDIR to a folder with room, or give the address of a cluster by "
            "--address HOST:PORT.",
        ) from None


@contextmanager
def few_daemons() -> Iterator[None]:
    """While Ray starts: only the daemons that a sweep needs, in a session of their own.

    In our session they would end at once with a SIGTERM to the whole group (timeout, systemd, a
    container's stop), and the sweep could not let its trials save. They still die with the sweep:
    the kernel sees to that. Dashboard, autoscaler, the collector of logs and the raylet's agents
    have nothing to do here, and each takes seconds of a processor to start.
    """

    def none(*_given: object, **_more: object) -> None:
        """Start nothing."""

    popen = services.ConsolePopen
    starts = {name: getattr(Node, name) for name in NOT_NEEDED}
    services.ConsolePopen = Daemon
    for name in NOT_NEEDED:
        setattr(Node, name, none)
    try:
        yield
    finally:
        services.ConsolePopen = popen
        for name, method in starts.items():
            setattr(Node, name, method)


class Daemon(services.ConsolePopen):  # type: ignore[misc]
    """A daemon of Ray's in a session of its own; the raylet without its agents."""

    def __init__(self, command: list[str], *given: Any, **more: Any) -> None:
        options = dict(word[2:].split("=", 1) for word in command if re.match("--[^=]+=", word))
        if options.keys() >= AGENTS:
            for port, number in AGENT_PORTS.items():
                persist_port(options["session_dir"], options["node_id"], port, number)
            names = {f"--{name}": subprocess.list2cmdline(STAND_IN) for name in AGENTS}
            halves = [word.partition("=") for word in command]
            command = [name + equals + names.get(name, value) for name, equals, value in halves]
        super().__init__(command, *given, start_new_session=True, **more)


def ray_folder() -> Path:
    """Where Ray keeps its files: the usual temporary folder, or another where that cannot be used.

    Raises:
        ConfigError: None of them can.
    """
    usual = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray"
    why = unusable(usual)
    if not why:
        return usual
    for folder in (Path("/tmp/ray"), Path(f"/tmp/ray-{os.getuid()}"), Path("/dev/shm/ray")):
        if not unusable(folder):
            say(f"Ray keeps its files in {folder}: {usual} {why}.")
            return folder
    raise ConfigError(
        f"Ray has no folder for its files: {usual} {why}, and /tmp cannot be used either.",
        rule=f"A folder that can be written, with {MIN_FREE >> 20} MiB free, of at most "
        f"{MOST_FOLDER_CHARACTERS} characters, for the names of sockets are short.",
        remedy="Make room, or set TMPDIR to such a folder.",
    )


def unusable(folder: Path) -> str:
    """Why Ray cannot keep its files in ``folder``; empty: it can."""
    if len(str(folder)) > MOST_FOLDER_CHARACTERS:
        return "is too long"
    parent = folder if folder.exists() else folder.parent
    try:
        with tempfile.TemporaryFile(dir=parent):
            free = shutil.disk_usage(parent).free
    except OSError as error:
        return f"cannot be written ({error.strerror})"
    return "" if free >= MIN_FREE else f"has {free >> 20} MiB free"
