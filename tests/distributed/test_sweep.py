"""Real sweeps: two workers a trial, early stopping, a killed driver, a failing trial, a stop
signal, PBT, a lost node.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml
from support import REPOSITORY, clean_environment, read_lines, run_ranks, tiny_config

from mltfr_dist.training.run_folder import dump_config, load_result
from mltfr_dist.tuning.records import Trial, load_trials, read_validations

pytestmark = pytest.mark.integration
EPOCHS = 12


def write_space(folder: Path, search: dict[str, Any], **changes: Any) -> Path:
    """A sweep's file over the tests' small run."""
    base = tiny_config(
        folder, training__epochs=EPOCHS, training__consensus_epochs=1, training__patience=EPOCHS
    )
    (folder / "base.yaml").write_text(dump_config(base))
    space = {
        "name": "sweep",
        "sweeps_dir": str(folder / "sweeps"),
        "config": str(folder / "base.yaml"),
        "search": search,
        "resources_per_trial": {"workers": 2, "cpus": 1},
        "final_seeds": [0, 1],
        **changes,
    }
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(space))
    return path


def start(path: Path, *overrides: str, **variables: str) -> subprocess.Popen[str]:
    """The command, in a session of its own."""
    log = path.with_suffix(".log").open("a")
    command = [sys.executable, str(REPOSITORY / "tuning" / "sweep.py"), str(path), *overrides]
    environment = clean_environment(DS_ACCELERATOR="cpu", **variables)
    return subprocess.Popen(
        command,
        env=environment,
        stdout=log,
        stderr=log,
        text=True,
        start_new_session=True,
        cwd=path.parent,
    )


def finish(path: Path, *overrides: str, code: int = 0) -> str:
    """Run the command to its end; returns what it and those before it have printed."""
    process = start(path, *overrides)
    result = process.wait(timeout=600)
    text = path.with_suffix(".log").read_text()
    assert result == code, text[-6000:]
    return text


def wait_until(process: subprocess.Popen[str], path: Path, condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 400
    while not condition():
        assert process.poll() is None, path.with_suffix(".log").read_text()[-6000:]
        assert time.monotonic() < deadline, path.with_suffix(".log").read_text()[-6000:]
        time.sleep(0.05)


def valid_lines(trial: Trial) -> list[dict[str, Any]]:
    path = trial.folder / "metrics.jsonl"
    return [line for line in read_lines(path) if line["kind"] == "valid"] if path.exists() else []


def listening(driver: int) -> set[str]:
    """Addresses at which the processes of a sweep's Ray listen (torch's store of a run's ranks is
    not Ray's).
    """
    result = set()
    for process in psutil.Process(driver).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" not in " ".join(process.cmdline()):
                sockets = process.net_connections(kind="inet")
                result |= {
                    s.laddr.ip.removeprefix("::ffff:")
                    for s in sockets
                    if s.status == psutil.CONN_LISTEN
                }
    return result


def train_workers(process: subprocess.Popen[str]) -> set[int]:
    """Processes of a sweep in which trials train now."""
    result = set()
    with suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if "RayTrainWorker" in " ".join(child.cmdline()):
                    result.add(child.pid)
    return result


@pytest.mark.timeout(1200)
def test_a_killed_sweep_goes_on_where_it_was(tmp_path: Path) -> None:
    # The base, which is tried first, is good, and so is the second; the others learn nothing, and
    # successive halving stops them.
    search = {"optimizer.learning_rate": {"choices": [0.001, 0.003, 1e-7, 2e-7, 3e-7, 4e-7]}}
    path = write_space(
        tmp_path, search, algorithm="grid", asha={"grace_epochs": 1, "reduction_factor": 2}
    )
    folder = tmp_path / "sweeps" / "sweep"
    process = start(path)

    def the_second_is_in_the_middle() -> bool:
        trials = load_trials(folder)
        return (
            len(trials) == 2 and trials[0].state == "finished" and len(valid_lines(trials[1])) > 3
        )

    wait_until(process, path, the_second_is_in_the_middle)
    assert listening(process.pid) == {"127.0.0.1"}
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    first, second = load_trials(folder)
    assert second.state == "unfinished"
    result = (first.folder / "result.json").stat()

    text = finish(path)

    trials = load_trials(folder)
    assert len(trials) == 6
    assert [t.state for t in trials] == ["finished"] * 2 + ["stopped"] * 4
    assert all(
        t.record.ended and t.record.ended.reason.startswith("asha after epoch") for t in trials[2:]
    )
    assert all(t.validations()[-1].epoch < EPOCHS for t in trials[2:]), (
        "their workers are gone, too"
    )
    assert (first.folder / "result.json").stat() == result, "a finished trial is not run again"
    assert f"trial {second.name}" in text.rpartition("5 of 6 trials to do")[2]
    assert "going on from train-step" in (folder / "trials" / "0001.log").read_text(), (
        "none is begun again from nothing"
    )

    assert all(not load_result(t.folder).test for t in trials if t.state == "finished"), (
        "trials leave the test split alone"
    )  # type: ignore[union-attr]
    run_ranks(
        2,
        REPOSITORY / "train.py",
        "--config",
        str(first.folder / "config.yaml"),
        f"runs_dir={tmp_path / 'by-hand'}",
    )
    by_hand = read_lines(tmp_path / "by-hand" / first.name / "metrics.jsonl")
    assert read_lines(first.folder / "metrics.jsonl") == [
        line for line in by_hand if line["kind"] != "test"
    ]
    finals = load_trials(next((folder / "final").iterdir()))
    assert [t.values["training.seed"] for t in finals] == [0, 1]
    assert all(load_result(t.folder).test for t in finals)  # type: ignore[union-attr]
    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert best["optimizer"]["learning_rate"] in (0.001, 0.003)
    report = (folder / "report.md").read_text()
    assert "train.py --config" in report
    assert "Over 2 seeds" in report
    assert (folder / "parallel.png").stat().st_size > 5000
    assert (folder / "effects.png").stat().st_size > 5000
    finish(path)
    assert len(load_trials(folder)) == 6


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_its_processes_serve_trial_after_trial(tmp_path: Path) -> None:
    # The second trial learns nothing and is stopped early; all three run in the same two processes.
    search = {"optimizer.learning_rate": {"choices": [0.001, 1e-7, 0.003]}}
    asha = {"grace_epochs": 1, "reduction_factor": 2}
    path = write_space(tmp_path, search, algorithm="grid", asha=asha, final_seeds=[])
    process, workers = start(path), set()
    while process.poll() is None:
        workers |= train_workers(process)
        time.sleep(0.2)
    assert process.returncode == 0, path.with_suffix(".log").read_text()[-6000:]
    trials = load_trials(tmp_path / "sweeps" / "sweep")
    assert [trial.state for trial in trials] == ["finished", "stopped", "finished"]
    assert len(workers) == 2
    last = trials[-1]
    config = str(last.folder / "config.yaml")
    options = ("--config", config, f"runs_dir={tmp_path / 'by-hand'}")
    run_ranks(2, REPOSITORY / "train.py", *options)
    by_hand = read_lines(tmp_path / "by-hand" / last.name / "metrics.jsonl")
    assert read_lines(last.folder / "metrics.jsonl") == [
        line for line in by_hand if line["kind"] != "test"
    ]


@pytest.mark.timeout(900)
def test_a_failing_trial_is_recorded_and_a_signal_saves(tmp_path: Path) -> None:
    # The second rate is one with which no step is finite: that trial fails when it has skipped too
    # many.
    # 99 tokens are more than a table has: these points are left out.
    search = {
        "optimizer.learning_rate": {"choices": [0.001, 1e30, 0.002]},
        "mltfr.filter.top_k": {"choices": [4, 99]},
    }
    fixed = {
        "mltfr.filter.shortlist_size": None,
        "training.epochs": 60,
        "training.patience": 60,
        "training.max_skipped_steps": 2,
        "optimizer.max_grad_norm": None,
    }
    options = {
        "scheduler": "none",
        "max_failures": 2,
        "final_seeds": [],
        "resources_per_trial": {"workers": 1, "cpus": 2},
    }
    path = write_space(tmp_path, search, algorithm="grid", overrides=fixed, **options)
    folder = tmp_path / "sweeps" / "sweep"
    process = start(path)

    def last_runs() -> bool:
        trials = load_trials(folder)
        return len(trials) == 3 and len(valid_lines(trials[-1])) > 2

    wait_until(process, path, last_runs)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=120) == 75, path.with_suffix(".log").read_text()[-4000:]
    failed, stopped = load_trials(folder)[1:]
    assert failed.state == "failed"
    assert failed.record.ended is not None
    assert "no finite loss and gradient" in failed.record.ended.reason
    text = path.with_suffix(".log").read_text()
    assert "is started again" not in text, "what is not finite will not be finite again"
    assert "3 points cannot run and are left out" in text
    assert "99 tokens" in text
    assert stopped.state == "unfinished"
    saved = sorted(p.name for p in (stopped.folder / "checkpoints").glob("train-step*"))[-1]
    steps = json.loads((stopped.folder / "checkpoints" / saved / "state.json").read_text())[
        "progress"
    ]["step"]

    text = finish(path)

    assert f"going on from {saved}" in (folder / "trials" / f"{stopped.name}.log").read_text()
    assert steps > 0
    assert [t.state for t in load_trials(folder)] == ["finished", "failed", "finished"]
    assert "failed: " in text
    assert "## Failed" in (folder / "report.md").read_text()


@pytest.mark.timeout(900)
def test_a_population_hands_on_its_weights(tmp_path: Path) -> None:
    # The rates of seed 4 are 1.3e-3 and 9e-7: the second trial learns nothing, and takes over the
    # weights of the first.
    search = {"optimizer.learning_rate": {"log_uniform": [1e-7, 1e-2]}}
    options = {
        "scheduler": "pbt",
        "pbt": {"every_epochs": 15, "quantile": 0.5},
        "num_trials": 2,
        "seed": 4,
        "final_seeds": [],
    }
    longer = {"training.epochs": 40, "training.patience": 40}
    resources = {"workers": 1, "cpus": 1}
    path = write_space(
        tmp_path,
        search,
        resources_per_trial=resources,
        overrides=longer,
        include_base=False,
        **options,
    )
    text = finish(path)
    folder = tmp_path / "sweeps" / "sweep"
    trials = load_trials(folder)
    assert [trial.state for trial in trials] == ["finished", "finished"], text[-4000:]
    taken = [trial for trial in trials if trial.record.generation]
    assert taken, "a trial went on from another's weights"
    assert re.findall(r"epoch (\d+), all 2 trials compared", text) == ["15", "30"]
    for trial in taken:
        assert "going on from" in trial.folder.with_suffix(".log").read_text()
        assert trial.validations()[-1].epoch >= 40
        earlier = [
            read_validations(other / "metrics.jsonl")
            for other in (folder / "trials").glob("00??*/")
        ]
        begun = trial.validations()[:3]
        same = [other for other in earlier if other[:3] == begun]
        assert len(same) >= 2, "its record begins as that of the trial whose weights it has"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_population_larger_than_its_slots_takes_turns(tmp_path: Path) -> None:
    # The rates of seed 42 are 1.9e-3, 5e-7 and 5e-3: the second trial is the worst whenever its
    # turn comes.
    search = {"optimizer.learning_rate": {"log_uniform": [1e-7, 1e-2]}}
    options = {
        "scheduler": "pbt",
        "pbt": {"every_epochs": 15, "quantile": 0.34},
        "num_trials": 3,
        "max_concurrent": 1,
        "seed": 42,
        "final_seeds": [],
        "include_base": False,
        "resources_per_trial": {"workers": 1, "cpus": 1},
        "overrides": {"training.epochs": 45, "training.patience": 45},
    }
    path, folder = write_space(tmp_path, search, **options), tmp_path / "sweeps" / "sweep"
    process = start(path)

    def the_second_turn_has_begun() -> bool:
        return any(len(valid_lines(trial)) > 15 for trial in load_trials(folder))

    wait_until(process, path, the_second_turn_has_begun)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    text = finish(path)
    assert "1 at a time" in text
    assert re.findall(r"epoch (\d+), all 3 trials compared: 0001 goes on from", text) == [
        "15",
        "30",
    ]
    trials = load_trials(tmp_path / "sweeps" / "sweep")
    assert [trial.state for trial in trials] == ["finished"] * 3, text[-4000:]
    assert any(trial.record.generation for trial in trials), "a trial took over another's weights"
    assert begun_before_any_ended(text) == {"0000", "0001", "0002"}


def begun_before_any_ended(text: str) -> set[str]:
    """Numbers of the trials that a sweep's output names before one is finished."""
    events = [line for line in text.splitlines() if line.startswith("  trial 000")]
    first_end = next(i for i, line in enumerate(events) if " finished" in line)
    return {line.split()[1][:4] for line in events[:first_end]}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_ready_made_population_of_eight_exchanges_on_two_cpus(tmp_path: Path) -> None:
    ready = yaml.safe_load((REPOSITORY / "tuning/spaces/population.yaml").read_text())
    ready.pop("preset")
    search, lasting = ready.pop("search"), {"training.epochs": 7, "training.patience": 7}
    more = ready | {"final_seeds": [], "max_concurrent": 2, "overrides": lasting, "name": "sweep"}
    path, workers = write_space(tmp_path, search, **more), set()
    process = start(path)
    while process.poll() is None:
        workers |= train_workers(process)
        time.sleep(0.2)
    text = path.with_suffix(".log").read_text()
    assert process.returncode == 0, text[-6000:]
    trials = load_trials(tmp_path / "sweeps" / "sweep")
    assert [trial.state for trial in trials] == ["finished"] * 8, text[-4000:]
    assert begun_before_any_ended(text) == {f"{number:04d}" for number in range(8)}
    # Two of the eight, a quarter, take over the weights of two others at each exchange.
    exchanges = re.findall(r"epoch (\d+), all 8 trials compared: (.*)", text)
    assert [epoch for epoch, _ in exchanges] == ["3", "6"]
    taken = [re.findall(r"(\d{4}) goes on from (\d{4})", takes) for _, takes in exchanges]
    assert [len({target for target, _ in takes}) for takes in taken] == [2, 2]
    generations = Counter(int(target) for takes in taken for target, _ in takes)
    assert {t.number: t.record.generation for t in trials if t.record.generation} == generations
    assert [t.validations()[-1].epoch for t in trials] == [8] * 8, "7 epochs, 1 of the second stage"
    assert len(workers) == 2, "the same two processes take all turns"


@pytest.mark.timeout(900)
def test_a_deleted_trial_is_run_again_under_its_number(tmp_path: Path) -> None:
    options = {"scheduler": "none", "final_seeds": [], "algorithm": "grid"}
    one = {"workers": 1, "cpus": 1}
    search = {"training.seed": {"choices": [0, 1, 2, 3]}}
    short = {"training.epochs": 2, "training.patience": 2}
    path = write_space(tmp_path, search, resources_per_trial=one, overrides=short, **options)
    finish(path)
    folder = tmp_path / "sweeps" / "sweep"
    before = {t.number: read_lines(t.folder / "metrics.jsonl") for t in load_trials(folder)}
    for left in (folder / "trials").glob("0001*"):  # wholly; of 0002 the record alone
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    (folder / "trials" / "0002.json").unlink()
    result = (folder / "trials" / "0002" / "result.json").stat()

    text = finish(path, "--retry-failed").rpartition("inputs are sound")[2]

    assert "2 of 4 trials to do" in text
    assert "trial 0001  was deleted and is run again" in text
    trials = load_trials(folder)
    assert [(t.number, t.values["training.seed"], t.state) for t in trials] == [
        (number, number, "finished") for number in range(4)
    ]
    assert {t.number: read_lines(t.folder / "metrics.jsonl") for t in trials} == before
    assert (folder / "trials" / "0002" / "result.json").stat() == result, "a run is not made anew"


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)],
    ids=lambda number: number.name,
)
def test_a_signal_to_the_whole_group_saves(tmp_path: Path, number: signal.Signals) -> None:
    options = {
        "scheduler": "none",
        "final_seeds": [],
        "resources_per_trial": {"workers": 1, "cpus": 1},
        "overrides": {"training.epochs": 500, "training.patience": 500},
    }
    path = write_space(tmp_path, {"training.seed": {"choices": [0]}}, algorithm="grid", **options)
    process = start(path)
    folder = tmp_path / "sweeps" / "sweep"
    wait_until(
        process,
        path,
        lambda: bool(load_trials(folder)) and len(valid_lines(load_trials(folder)[0])) > 2,
    )
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, number)
    assert process.wait(timeout=60) == 75, path.with_suffix(".log").read_text()[-4000:]
    (trial,) = load_trials(folder)
    assert trial.state == "unfinished"
    assert list((trial.folder / "checkpoints").glob("train-step*"))
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def ray_node(environment: dict[str, str], *options: str) -> subprocess.Popen[bytes]:
    """A node of a Ray cluster, with one CPU."""
    free_ports = ("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0")
    common = ("--block", "--num-cpus=1", "--disable-usage-stats", *free_ports)
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", *common, *options]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env=environment, start_new_session=True, **quiet)


def kill_node(node: subprocess.Popen[bytes]) -> None:
    """As by a power cut: all processes of the node at once."""
    for process in [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    node.wait()


@pytest.mark.timeout(900)
@pytest.mark.slow
def test_a_lost_node_costs_its_trial_no_epoch(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"{ray.util.get_node_ip_address()}:{port}"
    token = tmp_path / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    protected = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
    }  # as slurm/sweep.sbatch does
    environment = clean_environment(DS_ACCELERATOR="cpu", **protected)
    longer = {"training.epochs": 60, "training.patience": 60}
    options = {
        "scheduler": "none",
        "final_seeds": [],
        "resources_per_trial": {"workers": 1, "cpus": 1},
        "overrides": longer,
    }
    path = write_space(
        tmp_path, {"training.seed": {"choices": [0, 1]}}, algorithm="grid", **options
    )
    folder = tmp_path / "sweeps" / "sweep"
    head = ray_node(environment, "--head", f"--port={port}", "--include-dashboard=false")
    other = ray_node(environment, f"--address={address}")
    try:
        process = start(path, "--address", address, "--nodes", "2", **protected)

        def both_run() -> bool:
            trials = load_trials(folder)
            return len(trials) == 2 and all(len(valid_lines(trial)) > 3 for trial in trials)

        wait_until(process, path, both_run)
        kill_node(other)
        assert process.wait(timeout=600) == 0, path.with_suffix(".log").read_text()[-6000:]
    finally:
        kill_node(head)
    text = path.with_suffix(".log").read_text()
    assert "2 at a time" in text
    assert text.count("failed and is started again: its process has died") == 1
    trials = load_trials(folder)
    assert [trial.state for trial in trials] == ["finished", "finished"]
    logs = [(folder / "trials" / f"{trial.name}.log").read_text() for trial in trials]
    assert sum("going on from train-step" in log for log in logs) == 1, (
        "the lost trial alone goes on from its checkpoint"
    )
    for trial in trials:
        assert [line["epoch"] for line in valid_lines(trial) if line["stage"] == "train"] == list(
            range(1, 61)
        )
