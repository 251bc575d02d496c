"""The wheel by itself: built, installed outside the checkout, and trained, swept and exported with
from there.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from support import REPOSITORY, clean_environment, write_data, write_table

from mltfr_dist.training.run_folder import load_config

pytestmark = [pytest.mark.integration, pytest.mark.timeout(3000)]

TINY = """
training: {epochs: 1, consensus_epochs: 1, threads: 1}
data: {max_len: 10}
backbone: {hidden_dim: 16}
mltfr: {filter: {top_k: 4, shortlist_size: 40}, consensus: {fisher_sequences: 20}}
"""
SWEEP = (
    "preset=smoke",
    "config=tiny.yaml",
    "algorithm=random",
    "num_trials=1",
    "scheduler=none",
    "final_seeds=[]",
    "overrides={mltfr.filter.top_k: null, mltfr.filter.filter_ratio: 0.05}",
)
SCORES = """
import sys
from mltfr_dist.exported import load_exported
print(load_exported("model").scores([["i1", "i2"]]).shape, "deepspeed" in sys.modules)
"""


def run(*command: str | Path, folder: Path, **more: str) -> str:
    """What a command prints; its environment knows nothing of the checkout."""
    environment = clean_environment(DS_ACCELERATOR="cpu", RAY_USAGE_STATS_ENABLED="0", **more)
    del environment["PYTHONPATH"]
    done = subprocess.run(
        list(map(str, command)),
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=1400,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A wheel of the checkout, and its sdist."""
    folder = tmp_path_factory.mktemp("built")
    source = folder / "source"
    source.mkdir()
    for name in ("mltfr_dist", "ds_configs", "tuning"):
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    backend = "from setuptools import build_meta; build_meta.build_sdist('..')"
    run(sys.executable, "-c", backend, folder=source)
    (sdist,) = folder.glob("*.tar.gz")
    return wheel_of(source, folder / "wheel"), sdist


def wheel_of(source: Path, folder: Path) -> Path:
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    run(sys.executable, "-m", "pip", "wheel", *options, "-w", folder, source, folder=source.parent)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a fresh environment that holds the wheel; the dependencies are those of this
    one.
    """
    wheel, _ = built
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", "--without-pip", "venv", folder=folder)
    python = folder / "venv" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", "--quiet", wheel, folder=folder)
    packages = next((folder / "venv" / "lib").glob("python*/site-packages"))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "venv" / "bin"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a user's: small data and tables where the presets look for them."""
    folder = tmp_path_factory.mktemp("project")
    write_data(folder)
    (folder / "data").rename(folder / "ml-100k")
    (folder / "data").mkdir()
    (folder / "ml-100k").rename(folder / "data" / "ml-100k")
    for number, name in enumerate(("llama2", "smollm2", "minilm")):
        write_table(folder / "data" / "tables", name, num_rows=90, dim=12 + number, seed=number)
    (folder / "tiny.yaml").write_text(TINY)
    return folder


def test_wheel_and_sdist_hold_the_package_and_its_files(built: tuple[Path, Path]) -> None:
    wheel, sdist = built
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        metadata = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        described = archive.read(metadata).decode()
    package = REPOSITORY / "mltfr_dist"
    expected = {
        f"mltfr_dist/{path.relative_to(package)}"
        for pattern in (
            *("**/*.py", "py.typed", "ds_configs/*.json", "tuning/spaces/*.yaml"),
            *("models/kernels/*.cpp", "models/kernels/*.h"),
        )
        for path in package.glob(pattern)
    }
    assert packed == expected
    assert "Typing :: Typed" in described
    assert "Requires-Python: >=3.11" in described
    assert "Project-URL: Paper" in described
    with tarfile.open(sdist) as archive:
        links = [member.name for member in archive.getmembers() if not member.isreg()]
        assert all(archive.getmember(name).isdir() for name in links), "real files, no links"
        names = {name.partition("/")[2] for name in archive.getnames()}
        assert names >= expected
        archive.extractall(sdist.parent / "unpacked", filter="data")
    (unpacked,) = (sdist.parent / "unpacked").iterdir()
    again = wheel_of(unpacked, sdist.parent / "again")
    with zipfile.ZipFile(again) as first, zipfile.ZipFile(wheel) as second:
        assert sorted(first.namelist()) == sorted(second.namelist())
        assert all(first.read(name) == second.read(name) for name in expected)


def test_it_trains_exports_and_is_used_from_another_folder(installed: Path, project: Path) -> None:
    mltfr, python = installed / "mltfr", installed / "python"
    where = run(python, "-c", "import mltfr_dist; print(mltfr_dist.__file__)", folder=project)
    assert Path(where.strip()).is_relative_to(installed.parent)
    assert run(python, "-m", "mltfr_dist", "--version", folder=project).strip() == "0.1.0"
    said = run(mltfr, "train", "--preset", "smoke", "--config", "tiny.yaml", folder=project)
    assert "mltfr_dist/ds_configs/zero0.json" in said, "the packaged file, where none is given"
    elsewhere = project / "elsewhere"
    elsewhere.mkdir()
    run(mltfr, "recommend", "../runs/smoke", "--history", "i1,i2", folder=elsewhere)
    run(mltfr, "export", "../runs/smoke", "model", folder=elsewhere)
    assert "[1, 41]) False" in run(python, "-c", SCORES, folder=elsewhere)


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_launchers_start_the_module(installed: Path, project: Path, launcher: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    start = {
        "deepspeed": (
            *("deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", port),
            *("--module", "mltfr_dist.train"),
        ),
        "torchrun": (
            *("torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
            *("-m", "mltfr_dist.train"),
        ),
    }[launcher]
    run(
        *(installed / "python", "-m", *start, "--preset", "smoke", "--config", "tiny.yaml"),
        *(f"name={launcher}", "deepspeed=ds_configs/zero2.json"),
        folder=project,
        PATH=os.pathsep.join([str(installed), os.environ["PATH"]]),
    )
    assert (project / "runs" / launcher / "report.md").exists()
    assert load_config(project / "runs" / launcher).name == launcher


def test_it_sweeps_a_space_by_its_name(installed: Path, project: Path) -> None:
    said = run(installed / "mltfr", "sweep", "demo", *SWEEP, folder=project)
    assert "trial" in said
    assert (project / "runs/sweeps/demo/report.md").exists()
    assert (project / "runs/sweeps/demo/best.yaml").exists()
