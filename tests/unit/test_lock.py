"""A run's folder is written by one process at a time; only what a crash leaves is taken over."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import REPOSITORY, clean_environment, tiny_config

from mltfr_dist.distributed import lock
from mltfr_dist.distributed.lock import LOCK, acquire, check_held, newest_number, read_holder
from mltfr_dist.distributed.processes import Seen, own_process
from mltfr_dist.errors import EXIT_BAD_INPUT, CheckpointError, ConfigError
from mltfr_dist.training.run_folder import dump_config

HOLD = """
import sys, time
from pathlib import Path
from mltfr_dist.distributed.lock import acquire
acquire(Path(sys.argv[1]), print)
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Callable[[], subprocess.Popen[str]]]:
    """Starts another process that holds `tmp_path / "run"`."""
    started = []

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path / "run")],
            env=clean_environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "ENDING_SECONDS", 0.5)
    monkeypatch.setattr(lock, "SILENT_SECONDS", 1.5)
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(lock, "POLL_SECONDS", 0.05)


def rewrite(folder: Path, **changes: object) -> None:
    """Change what the newest holder says of itself."""
    path = folder / LOCK / f"{newest_number(folder):06d}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_an_end_in_order_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    for _ in range(2):
        held = acquire(folder, pytest.fail)
        assert [path.name for path in (folder / LOCK).iterdir()] == ["000001.json"]
        time.sleep(0.5)
        assert read_holder(folder, 1).beats >= 1, "signs of life"
        check_held()
        held.release()
        assert not list(folder.iterdir())


def test_a_second_start_says_who_holds_it(
    tmp_path: Path, hold: Callable[[], subprocess.Popen[str]]
) -> None:
    holder = hold()
    before = sorted(p.name for p in (tmp_path / "run" / LOCK).iterdir())
    with pytest.raises(ConfigError, match=f"is held by process {holder.pid} on .*, started 2") as e:
        acquire(tmp_path / "run", pytest.fail)
    assert f"kill -USR1 {holder.pid}" in e.value.remedy
    assert sorted(p.name for p in (tmp_path / "run" / LOCK).iterdir()) == before


@pytest.mark.parametrize("is_reaped", [True, False])
def test_a_process_that_is_gone_is_taken_over_from(
    tmp_path: Path, hold: Callable[[], subprocess.Popen[str]], is_reaped: bool
) -> None:
    holder, said = hold(), []
    holder.kill()
    if is_reaped:
        holder.wait()
    held = acquire(tmp_path / "run", said.append)
    assert len(said) == 1
    assert f"taken over from process {holder.pid}" in said[0]
    check_held()
    held.release()
    assert not list((tmp_path / "run").iterdir()), "what it was taken over from goes, too"


def test_a_stopped_process_still_holds(
    tmp_path: Path, hold: Callable[[], subprocess.Popen[str]]
) -> None:
    holder = hold()
    holder.send_signal(signal.SIGSTOP)
    time.sleep(2)
    with pytest.raises(ConfigError, match="is held by"):
        acquire(tmp_path / "run", pytest.fail)


def test_a_number_given_again_is_another_process(tmp_path: Path) -> None:
    """The process of that number is there, but it was born at another moment."""
    acquire(tmp_path, pytest.fail)
    lock._held.pop()._done.set()
    rewrite(tmp_path, born=own_process().born - 5)
    said: list[str] = []
    held = acquire(tmp_path, said.append)
    assert "which is gone" in said[0]
    held.release()


def test_on_another_machine_only_silence_counts(
    tmp_path: Path, hold: Callable[[], subprocess.Popen[str]]
) -> None:
    """Another host or container, or this host before it was started anew."""
    held, said = acquire(tmp_path, pytest.fail), []
    held._holder = held._holder.model_copy(update={"machine": "another", "host": "far"})
    rewrite(tmp_path, machine="another", host="far")
    with pytest.raises(ConfigError, match="on far"):
        acquire(tmp_path, said.append)
    assert "cannot be seen from here" in said[0]

    held._done.set()  # no further sign of life
    held._thread.join()
    started = time.monotonic()
    second = acquire(tmp_path, said.append)
    assert time.monotonic() - started > 1
    assert "gave no sign of life" in said[-1]
    with pytest.raises(CheckpointError, match="was taken over by process") as error:
        held.check()
    assert "from the last checkpoint" in error.value.remedy
    second.check()
    held.release()
    second.check()
    second.release()


@pytest.mark.parametrize("text", ["", '{"host": "cut o'])
def test_a_holder_cut_off_before_it_spoke(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK).mkdir()
    (tmp_path / LOCK / "000007.json").write_text(text)
    acquire(tmp_path, print).release()


def test_of_many_starts_at_once_one_holds(tmp_path: Path) -> None:
    """On a folder that nobody holds, and on one that a dead process left."""
    for round_ in range(6):
        folder = tmp_path / str(round_)
        if round_ % 2:
            (folder / LOCK).mkdir(parents=True)
            held = acquire(folder, pytest.fail)
            lock._held.remove(held)
            held._done.set()
            rewrite(folder, born=1)
        outcomes: list[object] = []

        def start(folder: Path = folder, outcomes: list[object] = outcomes) -> None:
            try:
                outcomes.append(acquire(folder, lambda _: None))
            except ConfigError as error:
                outcomes.append(error)

        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = [o for o in outcomes if isinstance(o, lock.Lock)]
        winner.check()
        winner.release()


def test_a_lock_that_was_deleted_by_hand_is_not_written_over(tmp_path: Path) -> None:
    first = acquire(tmp_path, pytest.fail)
    (tmp_path / LOCK / "000001.json").unlink()
    first.check()  # nobody else is there
    second = acquire(tmp_path, pytest.fail)
    second._holder = second._holder.model_copy(update={"started": "later"})
    rewrite(tmp_path, started="later")
    time.sleep(0.5)
    assert read_holder(tmp_path, 1).started == "later"
    with pytest.raises(CheckpointError, match="started later"):
        first.check()
    first.release()
    second.check()
    second.release()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        acquire(tmp_path / "file" / "run", pytest.fail)


def test_states_of_processes() -> None:
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    child.start()
    born = next(
        int(text.rpartition(")")[2].split()[19])
        for text in [Path(f"/proc/{child.pid}/stat").read_text()]
    )
    seen = Seen(child.pid, born)
    assert seen.state in "RS"
    os.kill(child.pid, signal.SIGSTOP)
    time.sleep(0.2)
    assert seen.state == "T"
    child.kill()
    time.sleep(0.2)
    assert seen.state == "", "a zombie has ended"
    child.join()
    assert Seen(child.pid, born).state == ""


@pytest.mark.integration
def test_the_same_command_started_twice(tmp_path: Path) -> None:
    """The first goes on to its end, the second says who has the folder and changes nothing."""
    config = tiny_config(tmp_path, training__epochs=400, training__patience=400)
    place = tmp_path / "config.yaml"
    place.write_text(dump_config(config))
    command = [sys.executable, str(REPOSITORY / "train.py"), "--config", str(place)]
    first = subprocess.Popen(command, env=clean_environment(), stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not list((config.folder / "checkpoints").glob("train-step*")):
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        second = subprocess.run(
            command, env=clean_environment(), capture_output=True, text=True, timeout=120
        )
        assert second.returncode == EXIT_BAD_INPUT, second.stderr
        assert f"is held by process {first.pid}" in second.stderr
        assert second.stderr.count("ConfigError") == 1
        assert first.poll() is None
    finally:
        first.send_signal(signal.SIGUSR1)
        first.wait(60)
    assert first.returncode == 75, "the remedy saves and stops"
    assert not (config.folder / LOCK).exists()
