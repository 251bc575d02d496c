"""Why a run ended is the last that real launchers leave on the screen."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support import REPOSITORY, clean_environment, tiny_config, torchrun

from mltfr_dist.distributed.last_word import ERROR_FILE, last_word
from mltfr_dist.errors import EXIT_BAD_INPUT
from mltfr_dist.training.run_folder import dump_config

BIN = Path(sys.executable).parent
TRAIN = REPOSITORY / "train.py"
WORKER = Path(__file__).parent / "health_worker.py"


def deepspeed(num_ranks: int, script: Path, *arguments: str) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [str(BIN / "deepspeed"), "--num_gpus", str(num_ranks), "--master_port", str(port)]
    return [*launcher, "--no_local_rank", str(script), *arguments]


def ended(command: list[str], folder: Path) -> tuple[int, list[str]]:
    """Exit code of a launcher, and what its screen shows."""
    process = subprocess.Popen(
        command,
        env=clean_environment(DS_ACCELERATOR="cpu"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        start_new_session=True,
    )
    try:
        stdout, _ = process.communicate(timeout=280)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, stdout.rstrip().splitlines()


LAUNCHERS = {
    "torchrun": (torchrun, TRAIN, []),
    "torchrun mltfr": (torchrun, BIN / "mltfr", ["train"]),
    "deepspeed": (deepspeed, TRAIN, []),
}
BAD = {
    "an unknown key": (
        "mltfr.router.topk=3",
        "ConfigError: ",
        "`mltfr.router.topk` is not a field",
    ),
    "no data": ("data.path=nowhere", "DataError: ", "nowhere"),
    "no such table": ("mltfr.tables=[nowhere]", "DataError: ", "nowhere"),
}


@pytest.mark.integration
@pytest.mark.parametrize(
    ("launcher", "fault"),
    [
        ("torchrun", "no data"),
        ("torchrun mltfr", "an unknown key"),
        ("deepspeed", "no such table"),
    ],
)
def test_bad_input(launcher: str, fault: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(dump_config(tiny_config(tmp_path)))
    make, script, first = LAUNCHERS[launcher]
    override, kind, words = BAD[fault]
    code, lines = ended(make(2, script, *first, "--config", "c.yaml", override), tmp_path)
    if make is deepspeed:
        assert code == EXIT_BAD_INPUT
    else:
        assert code == 1, "torchrun's own"
        assert set(lines.pop()) == {"="}, "the end of its summary"
        assert any(f"exitcode  : {EXIT_BAD_INPUT} " in line for line in lines)
    assert lines[-1].strip().startswith(kind), lines
    assert words in lines[-1]
    if fault == "an unknown key":
        train = "mltfr train" if "mltfr" in launcher else f"python {TRAIN}"
        assert f"`{train} --help mltfr.router`" in lines[-1]
    assert sum(line.strip().startswith(kind) for line in lines) == 2, "at once, and at the end"


@pytest.mark.integration
def test_losses_that_are_not_finite_under_deepspeed(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, training__max_skipped_steps=0)
    (tmp_path / "c.yaml").write_text(dump_config(config))
    code, lines = ended(deepspeed(2, WORKER, "nan", "c.yaml", "1"), tmp_path)
    assert code == EXIT_BAD_INPUT
    assert lines[-1].startswith("MltfrError: The last 1 steps, up to 2 of stage `train`,"), lines


# --- without a launcher, and its parts


def test_without_a_launcher_it_is_said_once() -> None:
    done = subprocess.run(
        [sys.executable, str(TRAIN), "--preset", "smoke", "a=1"],
        env=clean_environment(),
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
    )
    assert done.returncode == EXIT_BAD_INPUT
    assert done.stderr.count("ConfigError") == 1
    assert len(done.stderr.splitlines()) == 1


def test_torchrun_gets_an_error_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "error.json"))
    last_word("ConfigError: What. $5 and ${how}.")
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"]
    failures = {
        0: ProcessFailure(0, 1, 2, str(tmp_path / "error.json")),
        1: ProcessFailure(1, 2, -15, ""),
    }
    assert (
        str(ChildFailedError("train.py", failures))
        .rstrip("=")
        .endswith("\n  ConfigError: What. $5 and ${how}.\n")
    )
    monkeypatch.setenv(ERROR_FILE, str(tmp_path / "gone" / "error.json"))
    last_word("no place to write to is passed over")


LAUNCHER = """
import subprocess, sys, time
ranks = [subprocess.Popen([sys.executable, "-c", sys.argv[1]]) for _ in range(2)]
codes = [rank.wait() for rank in ranks]
time.sleep(0.3)
print("launcher:", codes, file=sys.stderr, flush=True)
"""
RANK = """
from mltfr_dist.distributed import last_word
last_word._is_deepspeed = lambda pid: True
last_word.last_word("why")
"""


def test_deepspeed_gets_it_once_it_has_ended() -> None:
    """Of two ranks that speak one is heard."""
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, RANK],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == "launcher: [0, 0]\nwhy\n"


def test_a_launcher_that_goes_on_is_not_waited_for_long() -> None:
    code = RANK.replace("last_word._is", "last_word.WAIT_SECONDS = 0; last_word._is")
    launcher = LAUNCHER.replace("0.3", "1")
    process = subprocess.Popen(
        [sys.executable, "-c", launcher, code],
        env=clean_environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    _, stderr = process.communicate(timeout=60)
    assert stderr == "launcher: [0, 0]\n"
