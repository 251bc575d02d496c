"""What Slurm says about a process becomes its rank; what contradicts it is refused, once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import REPOSITORY, clean_environment, tiny_config

from mltfr_dist.distributed.devices import sees_gpus, take_gpu
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
    for name, value in MEETING.items():  # as slurm/train.sbatch sets them
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_NODEID", "0")
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "1")
    assert is_launched()
    assert (os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"]) == ("1", "0")


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


CORES = """
import os, sys
os.sched_setaffinity(0, {int(core) for core in os.environ["CORES"].split(",")})
from mltfr_dist.distributed.meeting import leave, start_ranks, stop_ranks
import torch
start_ranks()
print("threads", torch.get_num_threads(), flush=True)
stop_ranks()
leave()
"""


@pytest.mark.integration
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
@pytest.mark.parametrize(
    ("cores", "threads"), [(("0,1", "0,1"), 1), (("0", "1"), 1), (("0,1",), 2)]
)
def test_a_rank_shares_the_cores_that_others_may_use_too(
    cores: tuple[str, ...], threads: int
) -> None:
    """Bound to a core each (task/affinity, --bind_cores_to_rank), ranks do not halve it again."""
    if os.sched_getaffinity(0) < {0, 1}:
        pytest.skip("needs cores 0 and 1")
    port = str(free_port())
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CORES],
            env=clean_environment(
                RANK=str(rank),
                WORLD_SIZE=str(len(cores)),
                LOCAL_RANK=str(rank),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
                CORES=own,
            ),
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, own in enumerate(cores)
    ]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [text.strip() for text in said] == [f"threads {threads}"] * len(cores)


def test_a_rank_that_does_not_see_its_gpu_says_what_to_ask_slurm_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"Rank 3 of .* sees 1 GPU\(s\)") as error:
        take_gpu(3)
    assert "--gpus-per-node and not --gpus-per-task" in error.value.remedy


def test_gpus_that_torch_does_not_see_are_not_left_idle_unsaid(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("SLURM_STEP_GPUS", "0,1")
    assert not sees_gpus(), "no task of srun"
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(ConfigError, match=r"GPU 0,1 of .*, and torch sees none"):
        sees_gpus()
    with monkeypatch.context() as asked:
        asked.setenv("DS_ACCELERATOR", "cpu")
        assert not sees_gpus()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not sees_gpus(), "hidden on purpose"


def test_the_cpu_that_was_asked_for_is_used_where_there_are_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    assert sees_gpus()
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert not sees_gpus()
    asking = [
        str(path.relative_to(REPOSITORY))
        for path in sorted((REPOSITORY / "mltfr_dist").rglob("*.py"))
        if "cuda.is_available" in path.read_text()
    ]
    assert asking == ["mltfr_dist/distributed/devices.py"], (
        "who asks torch overlooks DS_ACCELERATOR"
    )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


JOB = """
set -euo pipefail
SLURM_JOB_ID=1 PYTHON=false
source "$0"
tasks_of_nodes
echo "$SLURM_EXPORT_ENV ${SRUN_CPUS_PER_TASK:-none}"
"""


@pytest.mark.parametrize(
    ("tasks", "cpus", "printed"),
    [
        ("4(x2)", "3", ["4", "4", "ALL 3"]),
        ("4(x2),1", None, ["4", "4", "1", "ALL none"]),
        ("2", None, ["2", "ALL none"]),
        ("1,12(x3),2(x1)", "1", ["1", "12", "12", "12", "2", "ALL 1"]),
    ],
)
def test_what_the_batch_scripts_make_of_slurms_variables(
    tmp_path: Path, tasks: str, cpus: str | None, printed: list[str]
) -> None:
    environment = clean_environment(SLURM_TASKS_PER_NODE=tasks, SLURM_EXPORT_ENV="NONE")
    if cpus:
        environment["SLURM_CPUS_PER_TASK"] = cpus
    done = subprocess.run(
        ["bash", "-c", JOB, str(REPOSITORY / "slurm" / "job.sh")],
        env=environment,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == printed
