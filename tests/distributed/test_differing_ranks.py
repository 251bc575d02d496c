"""A node that differs from the others: one message, from rank 0, and nobody waits or writes."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import REPOSITORY, clean_environment, tiny_config, torchrun, write_table

from mltfr_dist.config import RunConfig
from mltfr_dist.errors import EXIT_BAD_INPUT
from mltfr_dist.training.run_folder import dump_config

WORKER = Path(__file__).parent / "differing_worker.py"
pytestmark = pytest.mark.integration


def refused(
    config: RunConfig,
    tmp_path: Path,
    *,
    package: str = "-",
    folder: str = "-",
    overrides: tuple[str, ...] = (),
) -> str:
    """The error that two ranks end with."""
    place = tmp_path / "config.yaml"
    place.write_text(dump_config(config))
    command = torchrun(2, WORKER, str(place), package, folder, *overrides)
    done = subprocess.run(
        command, env=clean_environment(), capture_output=True, text=True, timeout=120, cwd=tmp_path
    )
    assert done.returncode != 0
    assert f"exitcode  : {EXIT_BAD_INPUT}" in done.stderr
    assert not config.folder.exists(), "something was written"
    errors = [
        line
        for line in done.stderr.splitlines()
        if "Error: " in line and not line.startswith(" ") and "ChildFailedError" not in line
    ]
    assert len(errors) == 1, done.stderr
    return errors[0]


def test_another_version_of_the_code(tmp_path: Path) -> None:
    shutil.copytree(
        REPOSITORY / "mltfr_dist",
        tmp_path / "other" / "mltfr_dist",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    with (tmp_path / "other" / "mltfr_dist" / "metrics.py").open("a") as file:
        file.write("# changed\n")
    error = refused(tiny_config(tmp_path), tmp_path, package=str(tmp_path / "other"))
    assert "the code of mltfr_dist is not the same on rank 1 (" in error


def test_another_configuration(tmp_path: Path) -> None:
    error = refused(
        tiny_config(tmp_path), tmp_path, overrides=("training.seed=5", "optimizer.betas=[0.5,0.9]")
    )
    assert "`optimizer.betas`, `training.seed` are not the same on rank 1 (" in error


def test_another_way_of_computing(tmp_path: Path) -> None:
    """Gradients would come in another order, in which ZeRO adds them up."""
    error = refused(tiny_config(tmp_path), tmp_path, overrides=("MLTFR_GRAPHS=on",))
    assert "the environment's MLTFR_GRAPHS is not the same on rank 1 (" in error


def test_a_table_that_differs_between_nodes(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path, mltfr__tables=["tables/first", str(tmp_path / "tables" / "second")]
    )
    write_table(
        tmp_path / "node" / "tables", "first", num_rows=90, dim=12, seed=99
    )  # sound, and not the same
    assert "`first` is not the same on rank 1 (" in refused(
        config, tmp_path, folder=str(tmp_path / "node")
    )
    shutil.rmtree(tmp_path / "node" / "tables")
    error = refused(config, tmp_path, folder=str(tmp_path / "node"))
    assert "Rank 1 on " in error
    assert "DataError" in error
    assert "tables/first" in error


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ("training.global_batch_size=33",),
            "33 cannot be dealt out to 2 ranks in micro-batches of 16",
        ),
        (
            ("training.micro_batch_size=12",),
            "32 cannot be dealt out to 2 ranks in micro-batches of 12",
        ),
        (("training.global_batch_size=1",), "1 is below the number of ranks, 2"),
        (
            ("backbone.name=cl4srec", "backbone.cl4srec.contrast_group=3"),
            "contrast_group is 3, but a micro-batch holds 16 sequences",
        ),
    ],
)
def test_a_number_of_ranks_that_does_not_divide(
    tmp_path: Path, overrides: tuple[str, ...], words: str
) -> None:
    changes = {
        key.replace(".", "__"): int(v) if v.isdecimal() else v
        for key, v in (o.split("=") for o in overrides)
    }
    assert words in refused(tiny_config(tmp_path, **changes), tmp_path)


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    place = tmp_path / "config.yaml"
    place.write_text(dump_config(tiny_config(tmp_path)))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        launcher = [
            str(Path(sys.executable).parent / "deepspeed"),
            "--num_gpus",
            "2",
            "--master_port",
            str(port),
        ]
        command = [*launcher, str(REPOSITORY / "train.py"), "--config", str(place)]
        started = time.monotonic()
        done = subprocess.run(
            command,
            env=clean_environment(DS_ACCELERATOR="cpu"),
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
        )
    assert done.returncode == EXIT_BAD_INPUT
    assert time.monotonic() - started < 100
    assert done.stderr.count("the port is taken") == 2, "at once, and below what deepspeed says"
    assert f"127.0.0.1:{port}" in done.stderr


SLOW_TO_SPEAK = """
import sys, time, train
from mltfr_dist.distributed import meeting
fail = meeting.fail
meeting.fail = lambda error: (time.sleep(4), fail(error))[1]
meeting.leave(train.main(sys.argv[1:]))
"""


def start_rank(
    rank: int, config: Path, *overrides: str, port: int, slow: bool = False
) -> subprocess.Popen[str]:
    """One of two ranks, as a launcher starts it; its errors go to `rankN.log` beside the
    configuration.
    """
    numbers = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_PORT": str(port),
    }
    environment = clean_environment(DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", **numbers)
    program = ["-c", SLOW_TO_SPEAK] if slow else ["train.py"]
    command = [sys.executable, *program, "--config", str(config), *overrides]
    with (config.parent / f"rank{rank}.log").open("w") as log:
        return subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, text=True, cwd=REPOSITORY
        )


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_a_rank_that_fails_first_leaves_the_reason_to_rank_0(tmp_path: Path, port: int) -> None:
    place = tmp_path / "config.yaml"
    place.write_text(dump_config(tiny_config(tmp_path)).replace("epochs: 3", "epoch: 3"))
    other, main = start_rank(1, place, port=port), start_rank(0, place, port=port)
    assert main.wait(timeout=100) == EXIT_BAD_INPUT
    assert "training.epoch" in (tmp_path / "rank0.log").read_text()
    with pytest.raises(
        subprocess.TimeoutExpired
    ):  # a launcher would end rank 0 as soon as this one left
        other.wait(timeout=3)
    other.terminate()
    assert other.wait(timeout=100) == EXIT_BAD_INPUT
    assert not (tmp_path / "rank1.log").read_text()


def test_what_one_rank_alone_has_to_say_it_says(tmp_path: Path, port: int) -> None:
    place = tmp_path / "config.yaml"
    place.write_text(dump_config(tiny_config(tmp_path)))
    main, other = (
        start_rank(0, place, port=port),
        start_rank(1, place, "training.epoch=3", port=port),
    )
    assert other.wait(timeout=100) == EXIT_BAD_INPUT
    assert "training.epoch" in (tmp_path / "rank1.log").read_text()
    main.kill()  # what a launcher does
    main.wait()


def test_ranks_that_have_met_leave_after_rank_0_has_spoken(tmp_path: Path, port: int) -> None:
    place = tmp_path / "config.yaml"
    place.write_text(dump_config(tiny_config(tmp_path, training__global_batch_size=33)))
    main, other = start_rank(0, place, port=port, slow=True), start_rank(1, place, port=port)
    assert other.wait(timeout=100) == EXIT_BAD_INPUT
    assert "33 cannot be dealt out" in (tmp_path / "rank0.log").read_text()
    assert main.wait(timeout=100) == EXIT_BAD_INPUT
    assert "Error" not in (tmp_path / "rank1.log").read_text()
