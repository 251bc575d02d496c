"""What an interrupted preparation leaves belongs to it alone; odd places and full disks are said
plainly.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import fsspec
import numpy as np
import pytest

from mltfr_dist.cli import main as mltfr
from mltfr_dist.config import PrepareConfig, PrepareResources
from mltfr_dist.data.prepare import pipeline, write
from mltfr_dist.data.prepare.disk import check_space
from mltfr_dist.data.prepare.run import prepare
from mltfr_dist.errors import DataError

CONFIG = PrepareConfig(user_core=2, item_core=2, sequences_per_block=32, sequences_per_shard=100)
OTHER = CONFIG.model_copy(update={"item_core": 9, "split": "global_temporal"})


def quiet(_: str) -> None:
    """A log that nobody reads."""


def write_source(path: Path, seed: int = 0) -> Path:
    """6,000 interactions of 300 users with power-law items; every seed gives as many bytes."""
    random = np.random.default_rng(seed)
    users, items = (
        random.integers(100, 400, 6000),
        100 + (200 * random.random(6000) ** 3).astype(int),
    )
    times = random.integers(1.6e9, 1.7e9, 6000)
    rows = (f"u{u},i{i},{t}\n" for u, i, t in zip(users, items, times))
    path.write_text("user_id,item_id,timestamp\n" + "".join(rows))
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "raw.csv")


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return prepared(source, tmp_path_factory.mktemp("expected") / "out")


@pytest.fixture(scope="module")
def other(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return prepared(source, tmp_path_factory.mktemp("other") / "out", OTHER)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def prepared(
    source: Path | str, output: Path, config: PrepareConfig = CONFIG, **resources: object
) -> dict[str, bytes]:
    """The files of a preparation."""
    prepare(str(source), output, config, resources=PrepareResources(**resources), log=quiet)
    return contents(output)


def interrupted(
    step: str, source: Path | str, output: Path, config: PrepareConfig = CONFIG, **resources: object
) -> None:
    """A preparation that is cut off when it comes to ``step``."""

    def cut_off(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(write if step == "write_maps" else pipeline, step, cut_off)
        with pytest.raises(KeyboardInterrupt):
            prepared(source, output, config, **resources)


# --- whose work is it?
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["k_core", "order_by_time", "write_maps"])
@pytest.mark.parametrize("removed", [".out.partial", ".out.partial/plan.json"])
def test_what_is_left_under_temp_dir_is_no_other_preparations(
    source: Path, other: dict[str, bytes], tmp_path: Path, step: str, removed: str
) -> None:
    temporary = tmp_path / "temporary"
    interrupted(step, source, tmp_path / "out", temp_dir=temporary)
    place = tmp_path / removed
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    lines: list[str] = []
    resources = PrepareResources(temp_dir=temporary)
    prepare(str(source), tmp_path / "out", OTHER, resources=resources, log=lines.append)
    assert any("left by a preparation that was given up" in line for line in lines)
    assert not any("before the interruption" in line for line in lines)
    assert contents(tmp_path / "out") == other
    assert not any(temporary.iterdir())


def test_outputs_of_one_name_share_a_temp_dir_and_nothing_in_it(
    source: Path, expected: dict[str, bytes], other: dict[str, bytes], tmp_path: Path
) -> None:
    temporary = tmp_path / "temporary"
    interrupted("order_by_time", source, tmp_path / "a" / "out", temp_dir=temporary)
    assert prepared(source, tmp_path / "b" / "out", OTHER, temp_dir=temporary) == other
    lines: list[str] = []
    resources = PrepareResources(temp_dir=temporary)
    prepare(str(source), tmp_path / "a" / "out", CONFIG, resources=resources, log=lines.append)
    assert any("k-core: done before the interruption" in line for line in lines)
    assert contents(tmp_path / "a" / "out") == expected


def test_shards_and_plan_of_an_interruption_go_on_only_together(
    source: Path, other: dict[str, bytes], tmp_path: Path
) -> None:
    interrupted("write_maps", source, tmp_path / "out")
    assert list((tmp_path / ".out.partial" / "out").glob("*.tar"))
    (tmp_path / ".out.partial" / "plan.json").write_text("")  # as a power cut leaves it
    assert prepared(source, tmp_path / "out", OTHER) == other
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_database_of_another_plan_is_refused(source: Path, tmp_path: Path) -> None:
    interrupted("order_by_time", source, tmp_path / "one" / "out")
    interrupted("order_by_time", source, tmp_path / "two" / "out", OTHER)
    (theirs,) = (tmp_path / "two").glob("*/plan-*/prepare.duckdb")
    (ours,) = (tmp_path / "one").glob("*/plan-*/prepare.duckdb")
    shutil.copy(theirs, ours)
    with pytest.raises(DataError, match="belongs to another preparation") as caught:
        prepared(source, tmp_path / "one" / "out")
    assert f"Remove {ours.parent}" in caught.value.remedy


def test_copies_of_one_address_are_not_taken_for_those_of_another(tmp_path: Path) -> None:
    addresses = []
    for seed in (1, 2):
        path = write_source(tmp_path / f"{seed}.csv", seed)
        addresses.append(f"memory://{tmp_path.name}-{seed}/raw.csv")
        fsspec.filesystem("memory").put_file(str(path), addresses[-1].removeprefix("memory:/"))
    assert (tmp_path / "1.csv").stat().st_size == (tmp_path / "2.csv").stat().st_size
    temporary = tmp_path / "temporary"
    interrupted("k_core", addresses[0], tmp_path / "out", temp_dir=temporary)
    shutil.rmtree(tmp_path / ".out.partial")
    result = prepared(addresses[1], tmp_path / "out", temp_dir=temporary)
    right = prepared(tmp_path / "2.csv", tmp_path / "right")
    assert result.pop("manifest.json") != right.pop("manifest.json")  # the file's name
    assert result == right


def test_another_process_in_the_left_folder_is_not_disturbed(source: Path, tmp_path: Path) -> None:
    temporary = tmp_path / "temporary"
    interrupted("k_core", source, tmp_path / "out", temp_dir=temporary)
    (database,) = temporary.glob("*/plan-*/prepare.duckdb")
    script = (
        f"import duckdb, time; c = duckdb.connect({str(database)!r}); print(1, flush=True); "
        f"time.sleep(60)"
    )
    shutil.rmtree(tmp_path / ".out.partial")
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(DataError, match="Another process is working in"):
            prepared(source, tmp_path / "out", OTHER, temp_dir=temporary)
        process.kill()
    assert database.exists()


def test_a_moved_folder_and_a_damaged_database_lose_no_correctness(
    source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    interrupted("order_by_time", source, tmp_path / "before" / "out")
    (tmp_path / "before").rename(tmp_path / "after")
    (database,) = (tmp_path / "after").glob("*/plan-*/prepare.duckdb")
    database.write_bytes(b"no database" * 1000)
    lines: list[str] = []
    prepare(str(source), tmp_path / "after" / "out", CONFIG, log=lines.append)
    assert "Going on" in lines[0]
    assert "did not survive the interruption" in lines[1]
    assert contents(tmp_path / "after" / "out") == expected


# --- odd places
# ------------------------------------------------------------------------------------------------


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A tmpfs at ``folder``, where this user may mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may mount a small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


@pytest.mark.parametrize("step", [None, "k_core", "write_maps"])
def test_an_output_may_be_a_mount_point(
    source: Path, expected: dict[str, bytes], tmp_path: Path, step: str | None
) -> None:
    with mounted(tmp_path / "out", "size=50m") as output:
        (output / "lost+found").mkdir()
        if step:
            interrupted(step, source, output)
            assert not (output / "manifest.json").exists()
            assert [path.name for path in tmp_path.iterdir()] == ["out"]
        prepare(str(source), output, CONFIG, log=quiet)
        (output / "lost+found").rmdir()
        assert contents(output) == expected
        lines: list[str] = []
        prepare(str(source), output, CONFIG, log=lines.append)
        assert "verified and reused" in lines[0]


def test_an_output_may_be_a_link(source: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to("elsewhere")
    interrupted("write_maps", source, tmp_path / "out")
    assert prepared(source, tmp_path / "out") == expected
    assert (tmp_path / "out").is_symlink()
    assert contents(tmp_path / "elsewhere") == expected
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    with pytest.raises(DataError, match=r"link to .*missing, which is not there"):
        prepared(source, tmp_path / "nowhere")


def test_files_that_were_published_before_an_interruption_are_gone_on_with(
    source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    interrupted("write_maps", source, tmp_path / "out")
    for path in list((tmp_path / "out" / ".out.partial" / "out").glob("train-*")):
        path.rename(tmp_path / "out" / path.name)
    assert prepared(source, tmp_path / "out") == expected
    interrupted("write_maps", source, tmp_path / "other")
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match="was made since") as caught:
        prepared(source, tmp_path / "other")
    assert f"Remove the empty folder {tmp_path / 'other'}" in caught.value.remedy
    (tmp_path / "other").rmdir()
    assert prepared(source, tmp_path / "other") == expected


def test_places_that_cannot_be_written_are_refused_before_any_work(
    source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    finished = tmp_path / "read-only" / "finished"
    with mounted(tmp_path / "read-only", "size=20m") as read_only:
        prepared(source, finished)
        remount(read_only, "ro")
        before = sorted(tmp_path.rglob("*"))
        for output, temp_dir, words in [
            (read_only / "out", None, "read-only: Read-only file system"),
            (read_only / "a" / "out", None, "read-only: Read-only file system"),
            (tmp_path / "file" / "out", None, r"file is not a folder"),
            (tmp_path / ("n" * 250), None, "name of the output .* is too long"),
            (tmp_path / "out", read_only / "t", "--temp-dir .*Read-only file system"),
            (tmp_path / "out", tmp_path / "file", "--temp-dir .*file is not a folder"),
            (tmp_path / "out", tmp_path / "out" / "t", "--temp-dir .*lies in the output"),
        ]:
            with pytest.raises(DataError, match=words):
                prepared(source, output, temp_dir=temp_dir)
            assert sorted(tmp_path.rglob("*")) == before
        assert prepared(source, finished) == expected  # verified and reused: nothing to write
    long = tmp_path / ("n" * 245)
    assert prepared(source, long, temp_dir=tmp_path / "temporary") == expected


def test_what_is_written_lies_outside_what_is_read(source: Path, tmp_path: Path) -> None:
    (tmp_path / "events").mkdir()
    shutil.copy(source, tmp_path / "events" / "a.csv")
    for output, temp_dir, words in [
        (tmp_path / "events", None, "something other than prepared data"),
        (tmp_path / "events" / "out", None, "output .* lies in the source"),
        (tmp_path / "out", tmp_path / "events" / "t", "--temp-dir .* lies in the source"),
    ]:
        with pytest.raises(DataError, match=words):
            prepared(tmp_path / "events", output, temp_dir=temp_dir)
    assert [path.name for path in (tmp_path / "events").iterdir()] == ["a.csv"]


def test_bad_input_leaves_no_folder_that_was_made_for_it(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--user-core"):
        prepared(
            source,
            tmp_path / "a" / "b" / "out",
            CONFIG.model_copy(update={"user_core": 10_000}),
            temp_dir=tmp_path / "c" / "d",
        )
    assert not any(tmp_path.iterdir())


# --- full disks
# ------------------------------------------------------------------------------------------------


@contextmanager
def raised_into(said: set[str]) -> Iterator[None]:
    """Note what an error says."""
    try:
        yield
    except DataError as error:
        said.add(error.what)
        raise


@pytest.mark.parametrize("place", ["output", "temp_dir"])
def test_a_full_disk_at_any_moment_loses_nothing(
    source: Path, expected: dict[str, bytes], tmp_path: Path, place: str
) -> None:
    said: set[str] = set()
    for size in (4, 24, 100, 300, 600, 900, 1100, 1300, 1500, 1700, 1900, 2300):
        with mounted(tmp_path / f"disk-{size}", f"size={size}k") as disk:
            output = disk / "out" if place == "output" else tmp_path / f"out-{size}"
            resources = {"threads": 1} | ({"temp_dir": disk} if place == "temp_dir" else {})
            with suppress(DataError), raised_into(said):
                prepared(source, output, **resources)
            if not output.exists():
                remount(disk, "size=60m")
                prepared(source, output, **resources)
            assert contents(output) == expected
            left = [path.name for path in disk.iterdir()]
            assert left == (["out"] if place == "output" else [])
    words = {re.sub(r"[0-9.]+ MB are free.*", "# MB are free", what) for what in said}
    assert words == {"The disk is too small: # MB are free", "The disk is full: # MB are free"}


def test_a_disk_that_fills_while_rows_are_read_is_not_a_bad_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows beyond the memory limit are spilled while they are read."""
    rows = (f"{'u' * 60}{n % 9973},{'i' * 60}{n % 7919},{n}\n" for n in range(150_000))
    (tmp_path / "raw.csv").write_text("user_id,item_id,timestamp\n" + "".join(rows))
    with mounted(tmp_path / "disk", "size=3m") as disk:
        command = ["prepare", str(tmp_path / "raw.csv"), str(disk / "out")]
        command += ["--memory-limit", "30MB", "--threads", "1", "--user-core", "1"]
        assert mltfr(command) == 2
        message = capsys.readouterr().err
        assert "The disk is full" in message
        assert "Free some room and start the same command again" in message
        assert "cannot be read" not in message
        remount(disk, "size=300m")
        assert mltfr(command) == 0


def test_little_room_is_said_before(tmp_path: Path) -> None:
    free, lines = shutil.disk_usage(tmp_path).free, list[str]()
    check_space(tmp_path, free // 100, lines.append)
    assert not lines
    check_space(tmp_path / "not" / "there", free, lines.append)
    assert "often three times that is needed" in lines[0]
    with pytest.raises(DataError, match="The disk is too small"):
        check_space(tmp_path, 20 * free, lines.append)


def test_plans_name_options_as_they_are_typed(source: Path, tmp_path: Path) -> None:
    interrupted("k_core", source, tmp_path / "out", temp_dir=tmp_path / "t")
    with pytest.raises(DataError, match=r"--item-core was 2, now 9; --split was .*--temp-dir was"):
        prepared(source, tmp_path / "out", OTHER, temp_dir=tmp_path / "u")
    plan = json.loads((tmp_path / ".out.partial" / "plan.json").read_text())
    assert plan["output"] == str(tmp_path / "out")
