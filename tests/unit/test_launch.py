"""What Slurm says about a process becomes its rank; what contradicts it is refused, once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import REPOSITORY, clean_environment, tiny_config

from mltfr_dist.distributed.launch import LAUNCHER_VARIABLES, is_launched, tasks_of_nodes
from mltfr_dist.errors import EXIT_BAD_INPUT, ConfigError, OtherRankError
from mltfr_dist.training.run_folder import dump_config

TASK = {
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
}
MEETING = {"MASTER_ADDR": "n1", "MASTER_PORT": "1234"}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCHER_VARIABLES, "LOCAL_SIZE", *TASK):
        monkeypatch.setenv(name, "")  # so that what a test sets is taken back
        monkeypatch.delenv(name)


def test_no_launcher() -> None:
    assert not is_launched()


def test_a_task_of_srun_is_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (TASK | MEETING).items():
        monkeypatch.setenv(name, value)
    assert is_launched()
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")] == [
        "2",
        "3",
        "0",
        "1",
    ]


def test_a_single_task_is_a_single_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (TASK | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}).items():
        monkeypatch.setenv(name, value)
    assert not is_launched()


def test_a_launcher_in_each_task_is_no_contradiction(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun with two processes in each of three tasks."""
    launcher = {"RANK": "5", "WORLD_SIZE": "6", "LOCAL_RANK": "1"}
    for name, value in (TASK | MEETING | launcher).items():
        monkeypatch.setenv(name, value)
    assert is_launched()
    assert os.environ["RANK"] == "5"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "MASTER_ADDR or MASTER_PORT is not set"),
        (MEETING | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "WORLD_SIZE=1, but Slurm"),
        (MEETING | {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1"}, "RANK=1"),
        (MEETING | {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, "WORLD_SIZE=4"),
    ],
)
def test_contradictions_are_refused_and_one_task_speaks(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], words: str
) -> None:
    for name, value in (TASK | {"SLURM_PROCID": "0"} | given).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=words):
        is_launched()
    for name, value in (
        TASK | given | ({"RANK": "0"} if given.get("WORLD_SIZE") == "3" else {})
    ).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OtherRankError):
        is_launched()


def test_the_command_says_so_and_exits(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(tiny_config(tmp_path)))
    environment = clean_environment(**TASK, **MEETING, RANK="0", WORLD_SIZE="1", LOCAL_RANK="0") | {
        "SLURM_PROCID": "0"
    }
    command = [sys.executable, str(REPOSITORY / "train.py"), "--config", str(config)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == EXIT_BAD_INPUT
    assert done.stderr.count("ConfigError") == 1
    assert "SLURM_PROCID=0" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_an_incomplete_environment_is_refused_and_rank_0_speaks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "n1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="but not MASTER_PORT"):
        is_launched()
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(OtherRankError):
        is_launched()


@pytest.mark.parametrize(
    ("name", "value"), [("RANK", "2"), ("RANK", "x"), ("WORLD_SIZE", "-2"), ("MASTER_PORT", "")]
)
def test_what_cannot_be_a_rank_is_refused_before_it_waits(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    for given, number in (
        MEETING | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", name: value}
    ).items():
        monkeypatch.setenv(given, number)
    with pytest.raises(ConfigError, match=f"{name}={value}.*RANK lies below WORLD_SIZE"):
        is_launched()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SLURM_PROCID", "3"),
        ("SLURM_NODEID", "2"),
        ("SLURM_LOCALID", "1"),
        ("SLURM_STEP_TASKS_PER_NODE", "2(x2)"),
    ],
)
def test_slurm_that_contradicts_itself_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    for given, text in (TASK | {"SLURM_PROCID": "0"} | MEETING | {name: value}).items():
        monkeypatch.setenv(given, text)
    kind = ConfigError if name != "SLURM_PROCID" else OtherRankError
    with pytest.raises(kind, match="contradict" if kind is ConfigError else "says why"):
        is_launched()


@pytest.mark.parametrize(
    ("text", "counts"), [("2", [2]), ("4(x2),1", [4, 4, 1]), ("1,3(x2)", [1, 3, 3])]
)
def test_tasks_of_nodes(text: str, counts: list[int]) -> None:
    assert tasks_of_nodes(text) == counts
