"""A run is used and gone on with from any folder: its relative paths begin where it was started."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from inspect import signature
from pathlib import Path

import pytest
from support import read_lines, tiny_config, write_data, write_table

from mltfr_dist.cli import main as mltfr
from mltfr_dist.data.inspect.report import inspect
from mltfr_dist.data.prepare.run import prepare
from mltfr_dist.data.shards.manifest import load_manifest, read_manifest, verify_folder
from mltfr_dist.distributed.meeting import stop_ranks
from mltfr_dist.errors import ConfigError, DataError
from mltfr_dist.exported import load_exported, read_info
from mltfr_dist.resolve import resolve_config
from mltfr_dist.tables.build import build_tables
from mltfr_dist.tables.inspect import inspect_table
from mltfr_dist.tables.store import load_table, save_table
from mltfr_dist.training.origin import ORIGIN, origins
from mltfr_dist.training.reporting.matrix import summary
from mltfr_dist.training.run_folder import CONFIG, RESULT, dump_config, load_config, load_result
from mltfr_dist.training.running.fit import fit
from mltfr_dist.training.using.export import export
from mltfr_dist.training.using.inference import evaluate_run, load_run
from mltfr_dist.tuning.folders import folder_report
from mltfr_dist.tuning.source import base_config, go_where_begun, load_sweep, space_file
from mltfr_dist.tuning.sweep import claimed

RUN = Path("runs/mine")
RELATIVE = {
    "name": "mine",
    "runs_dir": "runs",
    "data__path": "data",
    "mltfr__tables": ["tables/first", "tables/second"],
    "deepspeed": "ds_configs/zero1.json",
    "training__epochs": 1,
    "training__consensus_epochs": 1,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project folder with data, tables and a finished run, all of it by relative paths."""
    project = tmp_path_factory.mktemp("origin") / "a"
    project.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        write_data(project)
        write_table(Path("tables"), "first", num_rows=90, dim=12, seed=1)
        write_table(Path("tables"), "second", num_rows=70, dim=20, seed=2)
        fit(tiny_config(project, **RELATIVE))
    yield project
    stop_ranks()


@pytest.fixture
def project(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it at another place, and a working folder beside it: the project has moved as a
    whole.
    """
    shutil.copytree(made, tmp_path / "a")
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "b")
    return tmp_path / "a"


def reported(project: Path) -> dict[str, float]:
    values: dict[str, float] = json.loads((project / RUN / RESULT).read_text())["test"]
    return values


@pytest.mark.parametrize("how", ["absolute", "relative"])
def test_a_run_is_used_from_another_folder(
    project: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(project / RUN) if how == "absolute" else "../a/runs/mine"
    assert mltfr(["evaluate", run]) == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx(reported(project), rel=1e-6)
    assert mltfr(["recommend", run, "--history", "i1,i2", "--explain"]) == 0
    assert mltfr(["report", run]) == 0
    assert mltfr(["export", run, "model"]) == 0
    assert Path("model/model.safetensors").exists(), "the output is relative to the working folder"
    assert {path.name for path in Path.cwd().iterdir()} == {"model"}


def test_it_goes_on_from_another_folder_and_its_files_stay_as_they_are(project: Path) -> None:
    (project / RUN / RESULT).unlink()
    lines = len(read_lines(project / RUN / "metrics.jsonl"))
    before = [(project / RUN / name).read_bytes() for name in (CONFIG, ORIGIN)]
    fit(resolve_config(None, f"../a/{RUN / CONFIG}", []))
    assert (project / RUN / RESULT).exists()
    assert len(read_lines(project / RUN / "metrics.jsonl")) >= lines
    assert [(project / RUN / name).read_bytes() for name in (CONFIG, ORIGIN)] == before
    assert list(Path.cwd().iterdir()) == []


def test_started_again_in_the_moved_project_it_notes_the_new_place(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    fit(resolve_config(None, RUN / CONFIG, []))
    assert origins(RUN) == [project]
    assert load_config(RUN).data.path == Path("data")


def test_the_run_alone_can_be_moved(made: Path, project: Path) -> None:
    """Its data stay where it was started; it goes on in its new folder."""
    shutil.move(project / RUN, "elsewhere")
    assert load_run("elsewhere").config.data.path == made / "data"
    config = resolve_config(None, Path("elsewhere") / CONFIG, [])
    assert config.folder.resolve() == Path("elsewhere").resolve()
    assert config.mltfr.tables == (made / "tables/first", made / "tables/second")
    fit(config)
    assert (Path("elsewhere") / "report.md").exists()
    assert not Path("runs").exists()


def test_what_is_nowhere_is_named_with_every_place(made: Path, project: Path) -> None:
    shutil.move(project / "tables/second", "kept")
    moved = made / "tables/second"
    moved.rename(made / "away")
    try:
        with pytest.raises(DataError) as caught:
            load_run(project / RUN)
        with pytest.raises(DataError, match="is not at"):
            resolve_config(None, project / RUN / CONFIG, [])
        other = ["name=other", f"mltfr.tables=[{project / 'tables/first'}]"]
        assert resolve_config(None, project / RUN / CONFIG, other).name == "other"
        for place in (project, made, Path.cwd()):
            assert str(place / "tables/second") in caught.value.what
        Path("tables").mkdir()
        shutil.move("kept", "tables/second")  # the last of the places
        assert load_run(project / RUN).config.mltfr.tables[1] == Path("tables/second")
    finally:
        (made / "away").rename(moved)


def test_a_bare_backbone_does_not_need_the_tables_it_lists(project: Path) -> None:
    text = (project / RUN / CONFIG).read_text()
    (project / RUN / CONFIG).write_text(
        re.sub("mltfr:\n  enabled: true", "mltfr:\n  enabled: false", text).replace("tables/", "t/")
    )
    config = load_config(project / RUN, locate=True)
    assert not config.mltfr.enabled
    assert config.data.path == project / "data"


def test_ones_own_file_begins_where_the_command_is_typed(project: Path) -> None:
    shutil.copy(project / RUN / CONFIG, "mine.yaml")
    assert resolve_config(None, "mine.yaml", []).data.path == Path("data")


def test_a_run_without_a_record_begins_where_the_command_is_typed(project: Path) -> None:
    (project / RUN / ORIGIN).unlink()
    assert origins(project / RUN) == [Path.cwd()]
    (project / RUN / ORIGIN).write_text("[]")
    assert origins(project / RUN) == [Path.cwd()]


def test_another_setting_from_another_folder_is_recorded_so_that_it_holds_everywhere(
    project: Path,
) -> None:
    (project / RUN / RESULT).unlink()
    Path("own.json").write_text('{"zero_optimization": {"stage": 2}}')
    fit(resolve_config(None, project / RUN / CONFIG, ["deepspeed=own.json"]))
    config = load_config(project / RUN)
    assert config.data.path == project / "data"
    assert origins(project / RUN)[0] == Path.cwd()
    with pytest.raises(ConfigError, match=r"training\.seed is 0 there and 1 here"):
        fit(resolve_config(None, project / RUN / CONFIG, ["training.seed=1"]))


# --- what is written, and who may read it


def test_every_file_may_be_read_as_any_new_one(made: Path, tmp_path: Path) -> None:
    """Data, tables, run, checkpoints and export."""
    assert mltfr(["export", str(made / RUN), str(tmp_path / "model")]) == 0
    (tmp_path / "new").touch()
    usual = (tmp_path / "new").stat().st_mode
    files = [path for top in (made, tmp_path) for path in top.rglob("*") if path.is_file()]
    assert len(files) > 30
    assert {"model.safetensors", "table.safetensors", "manifest.json"} <= {p.name for p in files}
    other = {str(path): oct(path.stat().st_mode) for path in files if path.stat().st_mode != usual}
    assert not other


def test_public_functions_take_texts_for_paths(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made)
    assert load_manifest("data") == verify_folder("data") == read_manifest("data")
    assert load_table("tables/first").name == "first"
    assert "40" in inspect("data", None)
    assert "first" in inspect_table("tables/first")
    assert load_config(str(RUN)).name == "mine"
    assert load_result(str(RUN)) is not None
    assert folder_report(str(RUN)).startswith("#")
    model = str(tmp_path / "model")
    export(str(RUN), model)
    assert load_exported(model).info == read_info(model)
    assert load_exported(model).scores([["i1"]]).shape == (1, 41)
    assert evaluate_run(str(RUN), "valid")
    for function in (
        *(load_manifest, verify_folder, read_manifest, load_table, save_table, build_tables),
        *(prepare, inspect, inspect_table, load_result, load_config, load_run, evaluate_run),
        *(export, load_exported, read_info, folder_report, summary, load_sweep, resolve_config),
    ):
        for parameter in signature(function).parameters.values():
            text = str(parameter.annotation)
            assert "Path" not in text or "str" in text, f"{function.__name__}({parameter})"


# --- sweeps


SPACE = """
name: tiny
config: base.yaml
algorithm: grid
search: {optimizer.learning_rate: {choices: [0.001, 0.002]}}
"""


@pytest.fixture
def sweep(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a sweep that was begun in the project."""
    monkeypatch.chdir(project)
    Path("base.yaml").write_text(dump_config(tiny_config(project, **RELATIVE)))
    Path("space.yaml").write_text(SPACE)
    begun = load_sweep("space.yaml", [])
    with claimed(begun, base_config(begun)):
        pass
    monkeypatch.chdir(project.parent / "b")
    return project / begun.folder


def test_a_sweep_goes_on_where_it_was_begun(
    sweep: Path, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mltfr(["sweep", str(sweep / "sweep.yaml"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert f"working in {project}" in printed
    assert "0.002" in printed
    assert Path.cwd() == project
    assert list((project.parent / "b").iterdir()) == []


def test_what_a_sweep_chose_is_trained_where_the_command_is_typed(sweep: Path) -> None:
    """Its inputs are those of the sweep, its run is a new one here."""
    shutil.copy(sweep / "base.yaml", sweep / "best.yaml")
    config = resolve_config(None, sweep / "best.yaml", [])
    assert config.data.path == sweep.parents[2] / "data"
    assert config.runs_dir == Path("runs")


def test_a_sweep_that_was_moved_alone_is_refused(sweep: Path) -> None:
    shutil.move(sweep, "alone")
    with pytest.raises(ConfigError, match="was moved") as caught:
        go_where_begun(Path("alone/sweep.yaml"))
    assert str(sweep) in str(caught.value)
    assert Path.cwd().name == "b"


def test_a_space_is_named_or_given_as_a_file(project: Path) -> None:
    assert load_sweep("demo", ["name=x"]).name == "x"
    assert space_file(Path("filter")).name == "filter.yaml"
    with pytest.raises(ConfigError, match="the nearest is `demo`"):
        load_sweep("demoo", [])
    Path("demo").mkdir()
    assert load_sweep("demo", []).name == "demo", "a folder of that name is no file"
    Path("filter").write_text(SPACE)
    assert load_sweep("filter", []).name == "tiny", "a file of that name is"
