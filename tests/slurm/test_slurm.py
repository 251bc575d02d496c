"""slurm/train.sbatch on a real Slurm of two virtual nodes: preempted, signalled and cancelled
jobs.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import (
    REPOSITORY,
    clean_environment,
    missing_for_slurm,
    read_lines,
    run_ranks,
    tiny_config,
)

from mltfr_dist.config import RunConfig
from mltfr_dist.errors import EXIT_STOPPED
from mltfr_dist.training.run_folder import dump_config, load_config, load_result

CLUSTER = Path(__file__).parent / "cluster.sh"
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(bool(missing_for_slurm()), reason=missing_for_slurm()),
]


class Slurm:
    """Commands against the test's own cluster; jobs are submitted from a folder that looks like the
    repository.
    """

    def __init__(self, folder: Path) -> None:
        self.submit_folder = folder / "submitted from here"  # a name with spaces
        self.submit_folder.mkdir()
        for name in ("slurm", "tuning", "ds_configs", "train.py"):
            (self.submit_folder / name).symlink_to(REPOSITORY / name)
        (self.submit_folder / ".venv").symlink_to(sys.prefix)  # where env.sh looks for Python
        self.environment = clean_environment(
            SLURM_CONF=str(folder / "cluster" / "slurm.conf"),
            PYTHON=sys.executable,
            DS_ACCELERATOR="cpu",
        )

    def command(self, *arguments: str, **environment: str) -> str:
        """Run a command to its end; returns what it printed."""
        done = subprocess.run(
            arguments,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
            cwd=self.submit_folder,
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    def train(self, config: Path, *more: str, **environment: str) -> str:
        """Submit a run on two nodes, with more options of sbatch; returns the job's id."""
        options = (
            "--parsable",
            "--partition=low",
            "--nodes=2",
            "--ntasks-per-node=1",
            # the nodes share the machine's cores, and a task is bound to its own
            "--cpus-per-task=2",
            *more,
            "slurm/train.sbatch",
        )
        return self.command("sbatch", *options, "--config", str(config), **environment).strip()

    def state(self, job: str) -> str:
        """The job's state; empty once Slurm has forgotten it."""
        shown = subprocess.run(
            ["scontrol", "show", "job", job, "-o"],
            env=self.environment,
            capture_output=True,
            text=True,
        )
        return shown.stdout.partition(" JobState=")[2].partition(" ")[0]

    def wait(self, what: str, condition: Callable[[], bool], seconds: float = 300) -> None:
        """Wait for a condition, or fail with the jobs' logs."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = [
                    *self.submit_folder.glob("slurm-*.log"),
                    *self.submit_folder.glob("slurm-logs/**/*.log"),
                ]
                pytest.fail(
                    f"{what}: not within {seconds} s\n"
                    + "\n".join(f"{log}:\n{log.read_text()}" for log in logs)
                )
            time.sleep(0.2)

    def log(self, job: str) -> str:
        """The batch script's log."""
        return (self.submit_folder / f"slurm-{job}.log").read_text()

    def rank_log(self, job: str, start: str) -> str:
        """Rank 0's log; empty while there is none."""
        path = self.submit_folder / "slurm-logs" / job / start / "rank0.log"
        return path.read_text() if path.exists() else ""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([str(CLUSTER), "up", str(folder / "cluster")], check=True, timeout=60)
    yield Slurm(folder)
    subprocess.run([str(CLUSTER), "down", str(folder / "cluster")], check=True, timeout=60)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    tiny_config(folder)
    return folder


def written(folder: Path, name: str, **changes: Any) -> tuple[RunConfig, Path]:
    config = tiny_config(
        folder, name=name, training__patience=9999, mltfr__consensus__enabled=False, **changes
    )
    path = folder / f"{name}.yaml"
    path.write_text(dump_config(config))
    return config, path


def num_lines(config: RunConfig) -> int:
    metrics = config.folder / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def cancel_and_compare(slurm: Slurm, job: str, config: RunConfig, folder: Path) -> None:
    """Cancel a job that was requeued once and trains again: it stays away, and its trace is that of
    an undisturbed run.
    """
    before = num_lines(config)
    slurm.wait(
        "it trains again",
        lambda: "going on from" in slurm.rank_log(job, "start1") and num_lines(config) > before + 6,
    )
    slurm.command("scancel", job)
    slurm.wait(
        "it is gone",
        lambda: slurm.state(job) in ("CANCELLED", "") and not slurm.command("squeue", "--noheader"),
    )
    assert slurm.log(job).count("requeued: it goes on from its last checkpoint") == 1, (
        "a cancelled job must not come back"
    )
    for start in ("start0", "start1"):
        logs = sorted(
            path.name for path in (slurm.submit_folder / "slurm-logs" / job / start).iterdir()
        )
        assert [name for name in logs if name.startswith("rank")] == ["rank0.log", "rank1.log"]
        assert f" start {start[-1]} on n[1-2]" in slurm.log(job)
    assert "StoppedError: A signal asked the run to stop" in slurm.rank_log(job, "start0")

    trace = read_lines(config.folder / "metrics.jsonl")
    whole, path = written(
        folder, f"{config.name}-undisturbed", training__epochs=trace[-1]["epoch"] + 1
    )
    run_ranks(2, REPOSITORY / "train.py", "--config", str(path))
    assert trace == read_lines(whole.folder / "metrics.jsonl")[: len(trace)]


@pytest.mark.timeout(900)
def test_a_preempted_job_goes_on_with_an_unbroken_trace(slurm: Slurm, inputs: Path) -> None:
    config, path = written(inputs, "preempted", training__epochs=9999)
    job = slurm.train(path)
    slurm.wait("the run trains", lambda: num_lines(config) > 2)
    high = (
        "--partition=high",
        "--nodes=2",
        "--exclusive",
        "--output=urgent.log",
        "--wrap=hostname",
    )
    urgent = slurm.command("sbatch", "--parsable", *high).strip()
    slurm.wait("it gives way", lambda: slurm.state(urgent) == "COMPLETED")
    cancel_and_compare(slurm, job, config, inputs)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_deepspeeds_launcher_and_the_signal_before_the_time_limit(
    slurm: Slurm, inputs: Path
) -> None:
    config, path = written(inputs, "signalled", training__epochs=9999)
    job = slurm.train(path, LAUNCHER="deepspeed")
    slurm.wait("the run trains", lambda: num_lines(config) > 2)
    slurm.command("scancel", "--batch", "--signal=USR1", job)  # what `--signal=B:USR1@180` sends
    slurm.wait("it saves and requeues itself", lambda: "requeued" in slurm.log(job))
    assert "srun -n 2" in slurm.log(job), "DeepSpeed's own launcher"
    cancel_and_compare(slurm, job, config, inputs)


def test_a_failing_job_is_not_requeued(slurm: Slurm, inputs: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(written(inputs, "bad")[1].read_text().replace("epochs: 3", "epoch: 3"))
    job = slurm.train(path)
    slurm.wait("it fails", lambda: slurm.state(job) == "FAILED")
    assert "training.epoch" in slurm.rank_log(job, "start0")
    assert "requeued" not in slurm.log(job)


def test_a_job_that_fails_while_a_rank_only_begins_is_not_requeued(
    slurm: Slurm, inputs: Path, tmp_path: Path
) -> None:
    """srun asks the other rank to stop, and that one's code, of one that was asked, is higher."""
    path, late = tmp_path / "bad.yaml", tmp_path / "python"
    path.write_text(written(inputs, "bad")[1].read_text().replace("epochs: 3", "epoch: 3"))
    late.write_text(
        "#!/usr/bin/env bash\n"
        '[[ ${SLURM_PROCID:-0} == 1 ]] || exec "$REAL" "$@"\n'
        f"trap 'exit {EXIT_STOPPED}' TERM; sleep 300 & wait\n"
    )
    late.chmod(0o755)
    job = slurm.train(path, PYTHON=str(late), REAL=sys.executable)
    slurm.wait("it fails", lambda: slurm.state(job) == "FAILED")
    assert f"Exited with exit code {EXIT_STOPPED}" in slurm.log(job)
    assert "ended with exit code 2;" in slurm.log(job)
    assert "requeued" not in slurm.log(job)


@pytest.mark.timeout(900)
def test_an_array_of_runs_where_nothing_is_exported(slurm: Slurm, inputs: Path) -> None:
    """`--export=NONE` reaches srun, too; each task of the array is a run of its own."""
    config, path = written(inputs, "none", training__epochs=2)
    text = path.read_text().replace("name: none", "name: none-%a").replace("seed: 0", "seed: 9")
    assert text.count("seed: 9") == 1
    path.write_text(text)
    options = ("--parsable", "--partition=low", "--nodes=2", "--ntasks-per-node=1")
    script = ("slurm/train.sbatch", "--config", str(path), "name=none-%a", "training.seed=%a")
    more = ("--export=NONE", "--array=3-4", "--cpus-per-task=1")
    slurm.command("sbatch", *options, *more, *script)
    for number in (3, 4):
        run = config.folder.with_name(f"none-{number}")
        slurm.wait(f"task {number} ends", lambda run=run: load_result(run) is not None, 500)
        assert load_config(run).training.seed == number
        result = load_result(run)
        assert result is not None
        assert result.world_size == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_node_that_goes_down_in_the_midst(slurm: Slurm, inputs: Path) -> None:
    """Slurm itself puts the job back into the queue; it goes on once the node is there again."""
    config, path = written(inputs, "down", training__epochs=9999)
    job = slurm.train(path, LAUNCHER="deepspeed")
    slurm.wait("the run trains", lambda: num_lines(config) > 6)
    slurm.command("scontrol", "update", "nodename=n2", "state=DOWN", "reason=test")
    slurm.wait("it waits", lambda: slurm.state(job) == "PENDING")  # for the node to register again
    before = num_lines(config)
    slurm.wait(
        "it trains again",
        lambda: "going on from" in slurm.rank_log(job, "start1") and num_lines(config) > before,
        500,
    )
    slurm.command("scancel", job)
    slurm.wait("it is gone", lambda: not slurm.command("squeue", "--noheader"))
