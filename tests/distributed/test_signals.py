"""Ctrl-C, SIGTERM and SIGHUP in each phase of a command: exit code 75 where it goes on, nothing
lost, no process left, and the last line says what to type.
"""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import duckdb
import psutil
import pytest
from support import REPOSITORY, clean_environment, read_lines, tiny_config
from test_sweep import valid_lines, write_space

from mltfr_dist.distributed import checkpoint, kept
from mltfr_dist.errors import EXIT_STOPPED
from mltfr_dist.training.run_folder import dump_config
from mltfr_dist.tuning.records import load_trials

TRAIN = [sys.executable, str(REPOSITORY / "train.py")]
MLTFR = [sys.executable, "-m", "mltfr_dist"]
AGAIN = "Start the same command again and it goes on."
LONG = {"training__epochs": 500, "training__patience": 500}
SIGNALS = pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name
)
GROUP = {"scheduler": "none", "final_seeds": [], "resources_per_trial": {"workers": 1, "cpus": 1}}
EPOCHS = {"training.epochs": 500, "training.patience": 500}


def take_signals() -> None:
    """As a terminal starts a command: under nohup, where these tests may run, some are ignored."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class Command:
    """A command in a session of its own; its output goes to a file."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.log = folder / "command.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                env=clean_environment(DS_ACCELERATOR="cpu"),
                stdout=log,
                stderr=log,
                cwd=folder,
                start_new_session=True,
                preexec_fn=take_signals,
            )

    @property
    def said(self) -> list[str]:
        """Lines of its output."""
        return self.log.read_text().splitlines()

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Until ``condition`` holds."""
        deadline = time.monotonic() + 300
        while not condition():
            assert self.process.poll() is None, self.said[-20:]
            assert time.monotonic() < deadline, self.said[-20:]
            time.sleep(0.01)

    def wait_for_line(self, text: str) -> None:
        """Until it has printed that."""
        self.wait_for(lambda: text in self.log.read_text())

    def signalled(self, number: signal.Signals, times: int = 1) -> int:
        """Exit code after a signal to the whole group, all of whose processes must end."""
        family = psutil.Process(self.process.pid).children(recursive=True)
        for _ in range(times):
            os.killpg(self.process.pid, number)
        code = self.process.wait(timeout=90)
        _, alive = psutil.wait_procs(family, timeout=20)
        left = [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
        assert not left
        assert "Traceback" not in self.log.read_text()
        return code

    def imports(self, library: str) -> bool:
        """Whether it has begun to import a compiled library."""
        with suppress(OSError):
            return library in Path(f"/proc/{self.process.pid}/maps").read_text()
        return False


def train_command(folder: Path) -> list[str]:
    (folder / "c.yaml").write_text(dump_config(tiny_config(folder, **LONG)))
    return [*TRAIN, "--config", "c.yaml"]


@SIGNALS
def test_a_run_that_starts_ends_at_once(tmp_path: Path, number: signal.Signals) -> None:
    command = Command(train_command(tmp_path), tmp_path)
    command.wait_for(lambda: command.imports("libtorch_cpu"))
    assert command.signalled(number) == EXIT_STOPPED
    (line,) = command.said
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    assert line == f"StoppedError: {name} ended the run: what it has saved stays. {AGAIN}"
    assert not (tmp_path / "runs").exists()


@pytest.mark.integration
@SIGNALS
def test_a_run_that_trains_saves(tmp_path: Path, number: signal.Signals) -> None:
    command = Command(train_command(tmp_path), tmp_path)
    command.wait_for_line("epoch 2/500")
    # A dropped connection may be told by the kernel and by the shell.
    assert command.signalled(number, 2 if number == signal.SIGHUP else 1) == EXIT_STOPPED
    said = [line for line in command.said if "the run saves at its next step" in line]
    assert len(said) == 1
    assert ("once more to end at once" in said[0]) == (number == signal.SIGINT)
    assert command.said[-1].startswith("StoppedError: A signal asked the run to stop; it did ")
    assert command.said[-1].endswith(AGAIN)
    folder = tmp_path / "runs" / "tiny"
    last = kept.latest_intact(folder / "checkpoints", "train", print)
    assert last is not None
    steps = [x["step"] for x in read_lines(folder / "metrics.jsonl") if x["kind"] == "step"]
    assert checkpoint.read_header(last).progress.step == steps[-1]


TWICE = """
import time
from mltfr_dist.distributed.signals import ended_by_signals, stop_signals
with ended_by_signals("the run: what it has saved stays"), stop_signals():
    print("runs", flush=True)
    time.sleep(100)
    time.sleep(100)
"""


def test_a_second_ctrl_c_ends_a_run_at_once_and_no_other_signal_does(tmp_path: Path) -> None:
    command = Command([sys.executable, "-c", TWICE], tmp_path)
    command.wait_for_line("runs")
    for _ in range(3):
        os.kill(command.process.pid, signal.SIGTERM)
        time.sleep(0.1)
    os.kill(command.process.pid, signal.SIGINT)
    time.sleep(0.3)
    assert command.process.poll() is None
    assert command.said == ["runs", "SIGTERM: the run saves at its next step"]
    assert command.signalled(signal.SIGINT) == EXIT_STOPPED
    assert command.said[-1].startswith("StoppedError: Ctrl-C ended the run: ")


FAILED = """
import time
from contextlib import suppress
from mltfr_dist.distributed.signals import ended_by_signals, stop_signals
with ended_by_signals("the run: what it has saved stays"):
    with suppress(ValueError), stop_signals():
        raise ValueError
    print("failed", flush=True)
    time.sleep(1)
raise SystemExit(3)
"""


def test_a_rank_that_has_failed_says_why_though_its_launcher_ends_it(
    tmp_path: Path,
) -> None:
    code = f"import os; os.environ['MASTER_ADDR'] = 'here'\n{FAILED}"
    command = Command([sys.executable, "-c", code], tmp_path)
    command.wait_for_line("failed")
    assert command.signalled(signal.SIGTERM) == 3
    assert command.said == ["failed"]


def test_what_is_ignored_stays_so(tmp_path: Path) -> None:
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + TWICE
    command = Command([sys.executable, "-c", code], tmp_path)
    command.wait_for_line("runs")
    os.kill(command.process.pid, signal.SIGHUP)
    time.sleep(0.2)
    assert command.said == ["runs"], "as under nohup"
    assert command.process.poll() is None
    command.process.kill()


def test_a_command_that_keeps_nothing_ends_in_silence(tmp_path: Path) -> None:
    tiny_config(tmp_path)
    command = Command([*MLTFR, "compare", "data", "data"], tmp_path)
    command.wait_for(lambda: command.imports("libtorch_cpu") or command.imports("pyarrow"))
    assert command.signalled(signal.SIGINT) == -signal.SIGINT
    assert not command.said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_preparation_ends_in_a_sentence_and_goes_on(
    tmp_path: Path, number: signal.Signals
) -> None:
    rows = 'SELECT i % 20011 AS "user_id", i * 7 % 3001 AS "item_id", i AS "timestamp"'
    duckdb.sql(f"COPY ({rows} FROM range(1500000) t(i)) TO '{tmp_path / 'events.csv'}'")
    prepare = [*MLTFR, "prepare", "events.csv", "data"]
    command = Command(prepare, tmp_path)
    command.wait_for_line("\nduplicates ")  # a query of the database goes on
    assert command.signalled(number) == EXIT_STOPPED
    assert "ended the preparation: steps and shards that are finished stay." in command.said[-1]
    assert command.said[-1].endswith(AGAIN)
    again = Command(prepare, tmp_path)
    assert again.process.wait(timeout=200) == 0
    assert "read: done before the interruption" in again.said
    assert (tmp_path / "data" / "manifest.json").exists()


# --- sweeps


def sweep_command(folder: Path) -> list[str]:
    search = {"training.seed": {"choices": [0, 1]}}
    path = write_space(
        folder, search, algorithm="grid", max_concurrent=1, overrides=EPOCHS, **GROUP
    )
    return [*MLTFR, "sweep", str(path)]


@pytest.mark.integration
@SIGNALS
@pytest.mark.timeout(300)
def test_a_sweep_whose_ray_starts_ends_at_once(tmp_path: Path, number: signal.Signals) -> None:
    command = Command(sweep_command(tmp_path), tmp_path)

    def raylet_runs() -> bool:
        children = psutil.Process(command.process.pid).children()
        return any(child.name() == "raylet" for child in children)

    command.wait_for(raylet_runs)
    time.sleep(1.0)  # Ray has put its own handler by now, and its agents start
    try:
        code = command.signalled(number)
    except AssertionError:  # its daemons may look for it for longer where it was aborted
        code = command.process.returncode
        if code != -signal.SIGABRT:
            raise
    if code == -signal.SIGABRT:  # while its core starts, Python is not asked: docs/tuning.md
        assert number == signal.SIGTERM
        assert "*** SIGTERM received" in command.log.read_text()
        return
    assert code == EXIT_STOPPED
    assert "LostRankError" not in command.log.read_text(), "its daemons were ended with it"
    assert " ended the sweep: what its trials have saved stays. " in command.said[-1]
    assert command.said[-1].endswith(AGAIN)


@pytest.mark.integration
@pytest.mark.timeout(300)
def test_a_sweep_whose_first_trial_starts_begins_no_other(tmp_path: Path) -> None:
    command = Command(sweep_command(tmp_path), tmp_path)
    command.wait_for_line("trial 0000")
    assert command.signalled(signal.SIGINT) == EXIT_STOPPED
    assert "running trials save, then the sweep ends; once more to end at once" in command.said[-2]
    assert command.said[-1].endswith(AGAIN)
    trials = load_trials(tmp_path / "sweeps" / "sweep")
    assert [trial.state for trial in trials] == ["unfinished"]
    assert not (trials[0].folder / "checkpoints").exists(), "it does not train a first step"


@pytest.mark.integration
@pytest.mark.timeout(600)
def test_a_sweep_whose_report_is_drawn_is_reported_by_the_next_start(tmp_path: Path) -> None:
    search, short = {"training.seed": {"choices": [0]}}, {"training.epochs": 1}
    path = write_space(tmp_path, search, algorithm="grid", overrides=short, **GROUP)
    report = tmp_path / "sweeps" / "sweep" / "report.md"
    for number in (signal.SIGHUP, signal.SIGTERM):  # behind the last trial, and where none is left
        command = Command([*MLTFR, "sweep", str(path)], tmp_path)
        maps = Path(f"/proc/{command.process.pid}/maps")
        command.wait_for(lambda maps=maps: "matplotlib" in maps.read_text())
        assert command.signalled(number) == EXIT_STOPPED
        ours = ("sweep `", "  ", "StoppedError: ")
        others = [line for line in command.said if not line.startswith(ours)]
        assert not others, "nothing of Ray's"
        assert " ended the sweep: what its trials have saved stays. " in command.said[-1]
        assert not report.exists()
    command = Command([*MLTFR, "sweep", str(path)], tmp_path)
    assert command.process.wait(timeout=200) == 0, command.said[-20:]
    assert report.exists()


@pytest.mark.integration
@pytest.mark.timeout(300)
@pytest.mark.parametrize("what", ["run", "sweep"])
def test_a_dropped_connection_lets_all_save(tmp_path: Path, what: str) -> None:
    """The terminal is gone, and each line that is written to it fails."""
    command = train_command(tmp_path) if what == "run" else sweep_command(tmp_path)
    folder = tmp_path / ("runs/tiny" if what == "run" else "sweeps/sweep/trials/0000")
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execve(command[0], command, clean_environment(DS_ACCELERATOR="cpu"))
    deadline, metrics = time.monotonic() + 200, folder / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count('"valid"') > 2):
        assert time.monotonic() < deadline
        os.set_blocking(terminal, False)
        with suppress(BlockingIOError):
            os.read(terminal, 65536)
        time.sleep(0.05)
    family = psutil.Process(pid).children(recursive=True)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == EXIT_STOPPED
    psutil.wait_procs(family, timeout=20)
    assert not [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    last = kept.latest_intact(folder / "checkpoints", "train", print)
    assert last is not None
    steps = [x["step"] for x in read_lines(metrics) if x["kind"] == "step"]
    assert checkpoint.read_header(last).progress.step == steps[-1]
    if what == "sweep":
        (trial,) = load_trials(tmp_path / "sweeps" / "sweep")
        assert trial.state == "unfinished"
        assert valid_lines(trial)
