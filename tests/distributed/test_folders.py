"""A run's folder that all ranks see, that a node sees late, or on each node's own disk.

Two ranks start in two folders and `runs_dir` is relative, so that each has its own; for the late
view a thread copies rank 0's folder to rank 1's, as a network client that goes by its memory.
"""

from __future__ import annotations

import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from support import REPOSITORY, clean_environment, read_lines, run_ranks, tiny_config

from mltfr_dist.config import RunConfig
from mltfr_dist.distributed.ranks import ALONE
from mltfr_dist.errors import EXIT_BAD_INPUT
from mltfr_dist.training.run_folder import RANKS, Result, dump_config, load_result
from mltfr_dist.training.using.inference import evaluate_run

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

PLACES = ("seen by all", "seen late", "own disks")
LATE_SECONDS = 3.0


def config_in(folder: Path) -> RunConfig:
    config = tiny_config(
        folder, checkpoint__every_steps=2, deepspeed=str(REPOSITORY / "ds_configs" / "zero2.json")
    )
    return config.model_copy(update={"runs_dir": Path("runs")})


class Nodes:
    """Two ranks, each a node with a folder of its own."""

    def __init__(self, folder: Path, config: RunConfig, place: str) -> None:
        self.file = folder / "config.yaml"
        self.file.write_text(dump_config(config))
        self.place = place
        self.folders = [folder / f"node{rank}" for rank in (0, 1)]
        for node in self.folders:
            node.mkdir(exist_ok=True)
        if place == "seen by all":
            self.folders[1] = self.folders[0]
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, *overrides: str, first: int = 0) -> None:
        """Start both ranks; ``first`` is the node of rank 0."""
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = str(listener.getsockname()[1])
        self.processes = []
        for rank in (0, 1):
            environment = clean_environment(
                RANK=str(rank),
                WORLD_SIZE="2",
                LOCAL_RANK="0",
                LOCAL_SIZE="1",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            )
            command = [sys.executable, str(REPOSITORY / "train.py"), "--config", str(self.file)]
            self.processes.append(
                subprocess.Popen(
                    [*command, *overrides],
                    env=environment,
                    cwd=self.folders[rank ^ first],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )

    def end(self) -> tuple[list[int], list[str]]:
        """Exit codes and outputs of both ranks."""
        said = ["".join(process.communicate(timeout=400)) for process in self.processes]
        return [process.returncode for process in self.processes], said

    def kill_at(self, num_lines: int) -> None:
        """SIGKILL both once metrics.jsonl has that many lines."""
        metrics = self.folders[0] / "runs" / "tiny" / "metrics.jsonl"
        deadline = time.monotonic() + 300
        while not (metrics.exists() and len(metrics.read_text().splitlines()) >= num_lines):
            assert all(process.poll() is None for process in self.processes), self.end()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        for process in self.processes:
            process.send_signal(signal.SIGKILL)
        self.end()

    @contextmanager
    def seen(self) -> Iterator[None]:
        """Show rank 1 what rank 0's folder was some seconds ago, where the place is seen late."""
        if self.place != "seen late":
            yield
            return
        done = threading.Event()

        def copy() -> None:
            while not done.wait(LATE_SECONDS):
                copy_tree(self.folders[0] / "runs", self.folders[1] / "runs")

        thread = threading.Thread(target=copy)
        thread.start()
        yield
        done.set()
        thread.join()


def copy_tree(source: Path, target: Path) -> None:
    """Make ``target`` what ``source`` is, as far as it holds still."""
    new = target.with_name("copying")
    shutil.rmtree(new, ignore_errors=True)
    with suppress(shutil.Error, FileNotFoundError):
        shutil.copytree(source, new)
        shutil.rmtree(target, ignore_errors=True)
        new.rename(target)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]], Result]:
    """The inputs, and what a run that nothing disturbs leaves."""
    folder = tmp_path_factory.mktemp("whole")
    config = config_in(folder).model_copy(update={"runs_dir": folder / "runs"})
    place = folder / "config.yaml"
    place.write_text(dump_config(config))
    run_ranks(2, REPOSITORY / "train.py", "--config", str(place))
    result = load_result(config.folder)
    assert result is not None
    return folder, read_lines(config.folder / "metrics.jsonl"), result


SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("stage", ["train", "consensus"])
@pytest.mark.parametrize("place", PLACES)
def test_killed_anywhere_and_started_again(
    whole: tuple[Path, list[dict[str, Any]], Result],
    tmp_path: Path,
    place: str,
    stage: str,
    seed: int,
) -> None:
    inputs, expected, outcome = whole
    lines = [i for i, line in enumerate(expected) if line["stage"] == stage]
    at = random.Random(f"{place} {stage} {seed}").randint(max(1, lines[0]), lines[-1] - 2)
    print(f"killed after {at} of {len(expected)} lines")
    nodes = Nodes(tmp_path, config_in(inputs), place)
    with nodes.seen():
        nodes.start()
        nodes.kill_at(at)
        nodes.start()
        codes, said = nodes.end()
    assert codes == [0, 0], said
    folder = nodes.folders[0] / "runs" / "tiny"
    assert read_lines(folder / "metrics.jsonl") == expected, f"killed after {at}"
    result = load_result(folder)
    assert result is not None
    assert (result.test, result.valid, result.checkpoint) == (
        outcome.test,
        outcome.valid,
        outcome.checkpoint,
    )
    if place == "own disks":
        assert "rank 1 (" in said[0], "it says where the run lies"
        assert not (nodes.folders[1] / "runs").exists(), "only rank 0 writes"


def test_a_run_on_another_nodes_disk_is_not_begun_anew(
    whole: tuple[Path, list[dict[str, Any]], Result], tmp_path: Path
) -> None:
    nodes = Nodes(tmp_path, config_in(whole[0]), "own disks")
    nodes.start("training.epochs=1", "mltfr.consensus.enabled=false")
    codes, said = nodes.end()
    assert codes == [0, 0], said
    nodes.start("training.epochs=1", "mltfr.consensus.enabled=false", first=1)
    codes, said = nodes.end()
    assert codes == [EXIT_BAD_INPUT, EXIT_BAD_INPUT], said
    assert said[0].count("sees a run at runs/tiny, and rank 0 on") == 1
    assert "ConfigError" not in said[1], "one rank speaks"
    assert not (nodes.folders[1] / "runs").exists()


def test_evaluate_on_two_ranks_prints_once(
    whole: tuple[Path, list[dict[str, Any]], Result], tmp_path: Path
) -> None:
    """And the ranks of users that it saves are those of one process, row by row."""
    run = whole[0] / "runs" / "tiny"
    shutil.copytree(run, tmp_path / "copy")
    (run / RANKS).unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    mltfr = str(Path(sys.executable).parent / "mltfr")
    done = subprocess.run(
        [*command, "--no-python", mltfr, "evaluate", str(run), "--save-ranks"],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("NDCG@10") == 1
    evaluate_run(tmp_path / "copy", "test", ALONE, keep_ranks=True)
    saved, alone = (pq.read_table(folder / RANKS) for folder in (run, tmp_path / "copy"))
    assert saved.equals(alone, check_metadata=True)
    assert len(saved) == 240
    missing = subprocess.run(
        [*command, "--no-python", mltfr, "evaluate", str(tmp_path)],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert missing.returncode != 0
    assert missing.stderr.count("holds no run") == 2, "one rank speaks, and so does torchrun"
