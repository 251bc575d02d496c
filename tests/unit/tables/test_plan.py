"""What `mltfr tables` refuses before it reads any row, and that its remedies work when typed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from table_files import table, write_single

from mltfr_dist.cli import main
from mltfr_dist.tables.checkpoints import EmbeddingSource
from mltfr_dist.tables.store import load_table


@pytest.fixture
def never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading any row fails."""

    def read(*_: object) -> None:
        raise AssertionError("rows were read")

    monkeypatch.setattr(EmbeddingSource, "blocks", read)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the command says when it refuses its input."""
    assert main(["tables", *map(str, arguments)]) == 2
    return capsys.readouterr().err


@pytest.mark.usefixtures("never_read")
@pytest.mark.parametrize("name", ["my table", "../x", "", "-", ".", "a/b", "x" * 101, "töken"])
def test_names_are_checked_first(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_single(tmp_path / "model", table())
    error = refused(capsys, folder, "--output", tmp_path / "out", f"--name={name}")
    assert f"ConfigError: --name {name!r} cannot be a table's name." in error
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    (proposed,) = re.findall(r"Use --name (\S+)\.\n", error)
    arguments = ["tables", str(folder), "--output", str(tmp_path / "out"), "--name", proposed]
    assert main(arguments) == 0
    assert load_table(tmp_path / "out" / proposed).info.name == proposed


@pytest.mark.usefixtures("never_read")
@pytest.mark.parametrize("place", ["file", "file/below", "dangling", "/proc/none", "x" * 300])
def test_outputs_are_checked_first(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_single(tmp_path / "model", table())
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    error = refused(capsys, folder, "--output", tmp_path / place)
    assert re.match(rf"DataError: .*{place}.* cannot be written: .*--output", error)


@pytest.mark.usefixtures("never_read")
def test_an_output_that_may_not_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel lets root write everywhere, so that its answer is given here."""
    monkeypatch.setattr("os.access", lambda path, mode: False)
    folder = write_single(tmp_path / "model", table())
    error = refused(capsys, folder, "--output", tmp_path / "out")
    assert f"{tmp_path} may not be written" in error


@pytest.mark.parametrize("change", ["--normalise=none", "--keep-special"])
def test_a_name_that_another_table_has_is_refused_first(
    tmp_path: Path,
    change: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = write_single(tmp_path / "model", table())
    arguments = ["tables", str(folder), "--output", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert main(arguments) == 0  # the same again
    with monkeypatch.context() as patch:
        patch.setattr(EmbeddingSource, "blocks", None)
        error = refused(capsys, *arguments[1:], change)
    assert "out/model already holds a different table (differing: " in error
    assert "config" in error
    assert "--name" in error
    assert main([*arguments, change, "--name", "other"]) == 0


@pytest.mark.usefixtures("never_read")
def test_a_name_that_something_else_has_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_single(tmp_path / "model", table())
    (tmp_path / "out/model").mkdir(parents=True)
    error = refused(capsys, folder, "--output", tmp_path / "out")
    assert "out/model exists and is no sound token table" in error


def test_names_from_odd_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_single(tmp_path / "A model (v1)", table())
    (folder / "below").mkdir()
    (tmp_path / "link").symlink_to(folder)
    for here, source, name in (
        (folder, ".", "A-model-v1"),
        (folder / "below", "..", "A-model-v1"),
        (tmp_path, "link/", "link"),
        (tmp_path, f"{folder}/model.safetensors", "model"),
    ):
        monkeypatch.chdir(here)
        assert main(["tables", source, "--output", str(tmp_path / "out")]) == 0
        assert load_table(tmp_path / "out" / name).info.name == name


@pytest.mark.usefixtures("never_read")
def test_several_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_single(tmp_path / "a/model", table())
    second = write_single(tmp_path / "b/model", table())
    output = ("--output", tmp_path / "out")
    error = refused(capsys, first, *output, second, "--name", "x")
    assert "--name is given for several sources" in error
    error = refused(capsys, first, second, "--vocabulary", first / "tokenizer.json")
    assert "--vocabulary is given for several sources" in error
    assert "Two of the sources make a table of the name 'model'" in refused(
        capsys, first, second, *output
    )
    assert "none does not exist" in refused(capsys, first, tmp_path / "none", *output)
    assert not (tmp_path / "out").exists()


def test_too_little_space(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_single(tmp_path / "model", table())
    usage = (100, 90, 10)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": usage[2]})())
    error = refused(capsys, folder, "--output", tmp_path / "out")
    assert "cannot be written: the table needs 0.00 GB of space" in error
    assert list((tmp_path / "out").iterdir()) == []


def test_a_disk_that_is_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real device that is: the kernel refuses the first byte."""
    from mltfr_dist.errors import DataError
    from mltfr_dist.tables.row_file import writing

    with (
        pytest.raises(DataError, match=r"/dev/full cannot be written: No space left on device"),
        writing(Path("/dev/full")),
        Path("/dev/full").open("wb", buffering=0) as file,
    ):
        file.write(b"x")


def test_options_stand_between_sources(tmp_path: Path) -> None:
    first = write_single(tmp_path / "a", table())
    second = write_single(tmp_path / "b", table())
    out = tmp_path / "out"
    assert main(["tables", str(first), "--output", str(out), str(second)]) == 0
    assert sorted(folder.name for folder in out.iterdir()) == ["a", "b"]
