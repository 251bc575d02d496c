"""Preparation beyond memory, over interruptions, and in other places than this machine's
folders.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import numpy as np
import pytest
from support import REPOSITORY, clean_environment

from mltfr_dist.config import PrepareConfig, PrepareResources
from mltfr_dist.data.prepare import pipeline, write
from mltfr_dist.data.prepare.run import prepare
from mltfr_dist.data.prepare.workspace import Workspace
from mltfr_dist.data.shards.manifest import load_manifest
from mltfr_dist.data.sources.remote import is_url
from mltfr_dist.errors import ConfigError, DataError
from mltfr_dist.schema import validate

CONFIG = PrepareConfig(user_core=2, item_core=2, sequences_per_block=32, sequences_per_shard=100)


def quiet(_: str) -> None:
    """A log that nobody reads."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20,000 interactions of 1,000 users with power-law items."""
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("source") / "raw.csv"
    users, items = random.integers(0, 1000, 20_000), (400 * random.random(20_000) ** 3).astype(int)
    rows = (
        f"u{u},i{i},{t}\n" for u, i, t in zip(users, items, random.integers(1.6e9, 1.7e9, 20_000))
    )
    path.write_text("user_id,item_id,timestamp\n" + "".join(rows))
    return path


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("expected") / "out"
    prepare(str(source), output, CONFIG, log=quiet)
    return contents(output)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("memory_limit", ["64MB", "8GB"])
@pytest.mark.parametrize("threads", [1, 3])
def test_resources_do_not_show_in_the_bytes(
    source: Path, expected: dict[str, bytes], tmp_path: Path, memory_limit: str, threads: int
) -> None:
    resources = PrepareResources(
        memory_limit=memory_limit, threads=threads, temp_dir=tmp_path / "temporary"
    )
    prepare(str(source), tmp_path / "out", CONFIG, resources=resources, log=quiet)
    assert contents(tmp_path / "out") == expected
    assert not any((tmp_path / "temporary").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "temporary"]


def test_too_little_memory_says_so_and_can_go_on(
    source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="does not fit into --memory-limit 1MB") as caught:
        prepare(
            str(source),
            tmp_path / "out",
            CONFIG,
            resources=PrepareResources(memory_limit="1MB"),
            log=quiet,
        )
    assert "Raise --memory-limit" in caught.value.remedy
    assert not (tmp_path / "out").exists()
    prepare(str(source), tmp_path / "out", CONFIG, log=quiet)
    assert contents(tmp_path / "out") == expected
    for limit in ("lots", "4", "-1GB", "4GB; SELECT 1"):
        with pytest.raises(ConfigError, match="--memory-limit"):
            validate(PrepareResources, {"memory_limit": limit}, source="a test")


# --- interruptions
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step", ["drop_duplicates", "k_core", "order_by_time", "make_id_maps", "write_maps"]
)
def test_an_interruption_in_any_step_loses_nothing_that_was_done(
    source: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(write if step == "write_maps" else pipeline, step, interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(str(source), tmp_path / "out", CONFIG, log=quiet)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    lines: list[str] = []
    prepare(str(source), tmp_path / "out", CONFIG, log=lines.append)
    assert lines[0].startswith("Going on with the preparation that was interrupted")
    assert any("read: done before the interruption" in line for line in lines)
    assert contents(tmp_path / "out") == expected
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(("after", "damage"), [(1, True), (2, False), (20, False), (20, True)])
def test_finished_shards_stay_and_are_verified(
    source: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    after: int,
    damage: bool,
) -> None:
    real, written = Workspace.record_shard, []

    def interrupting(self: Workspace, *arguments: object) -> None:
        real(self, *arguments)
        written.append(self.out / arguments[1].file)
        if len(written) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(Workspace, "record_shard", interrupting)
    with pytest.raises(KeyboardInterrupt):
        prepare(str(source), tmp_path / "out", CONFIG, log=quiet)
    monkeypatch.undo()
    with (tmp_path / ".out.partial" / "shards.jsonl").open("a") as journal:
        journal.write('\n{"split": "tra')  # a line that the crash cut
    (tmp_path / ".out.partial" / "out" / ".train-000099.tar").write_bytes(b"half a shard")
    if damage:
        written[-1].write_bytes(written[-1].read_bytes()[:-1])
    kept = {path.name: path.stat().st_mtime_ns for path in (written[:-1] if damage else written)}
    prepare(str(source), tmp_path / "out", CONFIG, log=quiet)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in kept} == kept
    assert names == set(expected)
    assert contents(tmp_path / "out") == expected


@pytest.mark.integration
@pytest.mark.parametrize("places", ["beside", "temp_dir", "in a folder that is there"])
@pytest.mark.parametrize(
    "moment",
    ["first shard", "0.3", pytest.param("0.6", marks=pytest.mark.slow), "0.9"],
)
def test_a_killed_process_is_gone_on_with(
    source: Path, expected: dict[str, bytes], tmp_path: Path, moment: str, places: str
) -> None:
    """The real command, killed without warning once it has begun, then run again."""
    options = ["--user-core", "2", "--item-core", "2"]
    options += ["--sequences-per-block", "32", "--sequences-per-shard", "100"]
    if places == "temp_dir":
        options += ["--temp-dir", str(tmp_path / "temporary")]
    output = tmp_path / "out"
    if places.startswith("in"):
        output.mkdir()
    program = "import sys; from mltfr_dist.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "prepare", str(source), str(output), *options]
    settings = {"env": clean_environment(), "cwd": REPOSITORY, "stdout": subprocess.DEVNULL}
    process = subprocess.Popen(command, **settings)
    partial = (output if places.startswith("in") else tmp_path) / ".out.partial"
    awaited = partial / ("shards.jsonl" if moment == "first shard" else "plan.json")
    while process.poll() is None and not awaited.exists():
        time.sleep(0.002)
    time.sleep(0 if moment == "first shard" else float(moment))
    os.kill(process.pid, signal.SIGKILL) if process.poll() is None else None
    process.wait()
    subprocess.run(command, check=True, timeout=200, **settings)
    assert contents(output) == expected
    assert not (tmp_path / "temporary").exists() or not any((tmp_path / "temporary").iterdir())


def test_what_another_configuration_began_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "k_core", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(str(source), tmp_path / "out", CONFIG, log=quiet)
    monkeypatch.undo()
    other = CONFIG.model_copy(update={"item_core": 3})
    with pytest.raises(
        DataError,
        match=r"\.out\.partial is half prepared, and differently: --item-core was 2, now 3",
    ) as caught:
        prepare(str(source), tmp_path / "out", other, log=quiet)
    assert "remove" in caught.value.remedy
    prepare(str(source), tmp_path / "out", CONFIG, log=quiet)  # what was begun is still there


def test_two_at_once_are_refused(source: Path, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "out", PrepareResources(), quiet, source=["raw.csv"])
    workspace.claim({})
    database = str(next(workspace.folder.glob("plan-*")) / "prepare.duckdb")
    script = (
        f"import duckdb, time; c = duckdb.connect({database!r}); print(1, flush=True); "
        f"time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with (
            pytest.raises(DataError, match="database of the preparation cannot be used") as caught,
            workspace.database(),
        ):
            pass
        other.kill()
    assert "other process" in caught.value.remedy


# --- other places
# ------------------------------------------------------------------------------------------------


def test_a_glob_of_files_is_one_source(
    source: Path, expected: dict[str, bytes], tmp_path: Path
) -> None:
    header, *lines = source.read_text().splitlines(keepends=True)
    for number, start in enumerate(range(0, len(lines), 7000)):
        (tmp_path / f"part-{number}.csv").write_text(header + "".join(lines[start : start + 7000]))
    manifest = prepare(str(tmp_path / "part-*.csv"), tmp_path / "out", CONFIG, log=quiet)
    assert {k: v for k, v in contents(tmp_path / "out").items() if k != "manifest.json"} == {
        k: v for k, v in expected.items() if k != "manifest.json"
    }
    assert manifest.source.file == "part-*.csv"
    assert manifest.report.rows_read == 20_000
    with pytest.raises(DataError, match="Nothing matches"):
        prepare(str(tmp_path / "no-*.csv"), tmp_path / "none", CONFIG, log=quiet)


@pytest.mark.parametrize("protocol", ["memory", "file"])
def test_urls_are_read_and_written(
    source: Path,
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    protocol: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    base = f"memory://{tmp_path.name}" if protocol == "memory" else f"file://{tmp_path}/store"
    store, root = fsspec.core.url_to_fs(base)
    store.makedirs(root, exist_ok=True)
    store.put_file(str(source), f"{root}/raw.csv")
    lines: list[str] = []
    manifest = prepare(f"{base}/raw.csv", f"{base}/prepared", CONFIG, log=lines.append)
    assert manifest.source.file == "raw.csv"
    result = {
        name.rpartition("/")[2]: store.cat_file(name)
        for name in store.ls(f"{root}/prepared", detail=False)
    }
    assert result == expected
    assert not [
        path for path in tmp_path.iterdir() if path.name != "store"
    ]  # nothing of it stays here
    assert prepare(f"{base}/raw.csv", f"{base}/prepared", CONFIG, log=lines.append) == manifest
    assert "already holds this data" in lines[-1]
    with pytest.raises(DataError, match="prepared differently: --item-core was 2, now 3"):
        prepare(
            f"{base}/raw.csv",
            f"{base}/prepared",
            CONFIG.model_copy(update={"item_core": 3}),
            log=quiet,
        )
    with pytest.raises(DataError, match="something other than prepared data"):
        prepare(str(source), base, CONFIG, log=quiet)
    with pytest.raises(DataError, match="cannot be read"):
        prepare(f"{base}/none.csv", f"{base}/other", CONFIG, log=quiet)
    assert (
        load_manifest(tmp_path / "store" / "prepared") == manifest if protocol == "file" else True
    )


@pytest.mark.parametrize(
    "address",
    ["pipe:cat raw.csv", "simplecache::s3://a/b", "pipe://id", "ssh://host/x", "ftp://h/x.csv"],
)
def test_addresses_that_run_commands_are_refused(address: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not of a kind that is read") as caught:
        prepare(address, tmp_path / "out", CONFIG, log=quiet)
    assert "run a command" in caught.value.rule
    with pytest.raises(DataError, match="not of a kind"):
        prepare("raw.csv", address, CONFIG, log=quiet)
    assert not any(tmp_path.iterdir())


def test_paths_are_no_urls(tmp_path: Path) -> None:
    (tmp_path / "a:b.csv").write_text("")
    assert not is_url(str(tmp_path / "a:b.csv"))
    assert not is_url("data/x.csv")
    assert is_url("s3://bucket/x.csv")
