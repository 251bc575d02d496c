"""The command line as typed: options between overrides, files that come with the program."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support import REPOSITORY, clean_environment, write_table

import train
from mltfr_dist.cli import build_parser, main, parse_intermixed
from mltfr_dist.distributed.deepspeed_file import read_deepspeed_file
from mltfr_dist.errors import ConfigError, DataError
from mltfr_dist.files import with_packaged
from mltfr_dist.tables.store import load_table
from mltfr_dist.tuning.source import load_sweep


@pytest.mark.parametrize(
    "arguments",
    [
        ["name=x", "--preset", "smoke", "training.epochs=7"],
        ["--preset", "smoke", "name=x", "training.epochs=7"],
        ["name=x", "training.epochs=7", "--preset=smoke"],
        ["name=x", "--resume", "auto", "training.epochs=7", "--preset", "smoke"],
        [
            "training.epochs=3",
            "--preset",
            "smoke",
            "name=x",
            "--resume",
            "auto",
            "training.epochs=7",
        ],
    ],
)
def test_options_stand_between_overrides(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*arguments, "--print-config"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["name"], config["training"]["epochs"]) == ("x", 7)
    options = parse_intermixed(build_parser(), ["train", *arguments])
    assert options.preset == "smoke"
    assert options.overrides == [a for a in arguments if "=" in a and not a.startswith("-")]


def test_mltfr_train_takes_what_train_py_takes(capsys: pytest.CaptureFixture[str]) -> None:
    """`--local_rank` too: `deepspeed --module mltfr_dist.train` passes it."""
    printed = []
    for command in (train.main, lambda rest: main(["train", *rest])):
        assert command(["--local_rank=0", "--preset", "smoke", "a=1", "--print-config"]) == 2
        assert command(["--local_rank=0", "--preset", "smoke", "name=x", "--print-config"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert yaml.safe_load(printed[0])["name"] == "x"


def test_options_stand_between_the_overrides_of_a_sweep() -> None:
    arguments = ["sweep", "--nodes", "2", "space.yaml", "a=1", "--address", "h:1", "b=-2"]
    options = parse_intermixed(build_parser(), arguments)
    assert (options.space, options.nodes, options.address) == ("space.yaml", 2, "h:1")
    assert options.overrides == ["a=1", "b=-2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "a=1", "--presett", "smoke"], "unrecognized arguments: --presett smoke"),
        (["train", "a=1", "--preset", "smoke", "-x", "b=1"], "unrecognized arguments: -x b=1"),
        (["inspect", "a", "b"], "unrecognized arguments: b"),
    ],
)
def test_what_is_no_override_is_still_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err


def test_an_override_without_its_value_is_said_wherever_it_stands() -> None:
    options = parse_intermixed(build_parser(), ["train", "a=1", "--preset", "smoke", "oops"])
    assert options.overrides == ["a=1", "oops"]  # which resolve_config refuses by name
    assert train.main(["a=1", "--preset", "smoke", "oops"]) == 2


def test_help_does_not_load_torch() -> None:
    program = (
        "import sys, train\ntry: train.main(['--help', 'all'])\nfinally: assert 'torch' not "
        "in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "optimizer.learning_rate" in done.stdout


# --- files that come with the program


def test_packaged_files_are_those_of_the_repository() -> None:
    for pattern in ("ds_configs/*.json", "tuning/spaces/*.yaml"):
        names = sorted(path.relative_to(REPOSITORY) for path in REPOSITORY.glob(pattern))
        assert len(names) > 4
        for name in names:
            packaged = REPOSITORY / "mltfr_dist" / name
            assert packaged.read_bytes() == (REPOSITORY / name).read_bytes()


def test_packaged_files_are_found_from_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert read_deepspeed_file(Path("ds_configs/zero3.json"))["zero_optimization"]["stage"] == 3
    assert load_sweep(Path("tuning/spaces/demo.yaml"), ["name=x"]).name == "x"
    own = Path("ds_configs/zero3.json")  # one that is there goes first
    own.parent.mkdir()
    own.write_text('{"zero_optimization": {"stage": 2}}')
    assert with_packaged(own) == own
    assert read_deepspeed_file(own)["zero_optimization"]["stage"] == 2
    with pytest.raises(ConfigError, match=r"ds_configs/zero9\.json does not exist"):
        read_deepspeed_file(Path("ds_configs/zero9.json"))


def test_a_run_starts_in_another_folder(tmp_path: Path) -> None:
    """Its DeepSpeed file is the packaged one, and the log says which."""
    from support import tiny_config, write_data

    write_data(tmp_path)
    write_table(tmp_path / "tables", "first", num_rows=90, dim=12, seed=1)
    write_table(tmp_path / "tables", "second", num_rows=70, dim=20, seed=2)
    config = tiny_config(tmp_path, deepspeed="ds_configs/zero0.json", training__epochs=1)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    done = subprocess.run(
        [
            sys.executable,
            str(REPOSITORY / "train.py"),
            "name=x",
            "--config",
            "mine.yaml",
            "mltfr.enabled=false",
        ],
        env=clean_environment(),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "mltfr_dist/ds_configs/zero0.json" in done.stdout


def test_a_table_named_without_its_folder_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("llama2", "minilm"):
        write_table(Path("data/tables"), name, num_rows=5, dim=2, seed=0)
    for meant in ("llama2", "llama", "data/tables/lama2"):
        with pytest.raises(DataError, match=r"[Dd]id you mean data/tables/llama2\?"):
            load_table(Path(meant))
    with pytest.raises(DataError, match=r"Build it with `mltfr tables`"):
        load_table(Path("nothing-like-it"))
