"""Help fits the screen, is short first and complete on demand; errors name what was typed."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import REPOSITORY, clean_environment

import train
from mltfr_dist import invocation
from mltfr_dist.cli import build_parser, main
from mltfr_dist.cli.commands import COMMANDS
from mltfr_dist.cli.help import topic_text
from mltfr_dist.config import RunConfig
from mltfr_dist.distributed.last_word import ERROR_FILE
from mltfr_dist.errors import ConfigError
from mltfr_dist.presets import PRESETS
from mltfr_dist.resolve import resolve_config
from mltfr_dist.schema import field_paths, section_at


def parser_of(command: str) -> argparse.ArgumentParser:
    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    result: argparse.ArgumentParser = commands.choices[command]
    return result


def shown(capsys: pytest.CaptureFixture[str], *arguments: str, program: str = "mltfr") -> str:
    with pytest.raises(SystemExit) as ended:
        (train.main if program == "train.py" else main)(list(arguments))
    assert ended.value.code == 0
    return capsys.readouterr().out


PAGES = [
    *([command, "--help"] for command in COMMANDS),
    ["--help"],
    *(["train", "--help", topic] for topic in ("all", "mltfr", "mltfr.filter", "training.epochs")),
]


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("arguments", PAGES, ids=" ".join)
def test_help_fits_the_screen(
    columns: int,
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = shown(capsys, *arguments)
    assert [line for line in text.splitlines() if len(line) > columns] == []
    if arguments[0] == "train":
        assert shown(capsys, *arguments[1:], program="train.py").split() != []


def test_help_that_goes_to_no_terminal_has_at_most_100_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    text = shown(capsys, "--help", "all", program="train.py")
    assert 80 < max(map(len, text.splitlines())) <= 100
    monkeypatch.setenv("COLUMNS", "500")
    assert shown(capsys, "--help", "all", program="train.py") == text


def test_help_is_short_and_leads_to_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    first = shown(capsys, "train", "--help")
    assert len(first.splitlines()) < 60
    sections = [path for path in field_paths(RunConfig) if section_at(RunConfig, path)]
    for word in (*PRESETS, *sections):
        assert f"\n  {word} " in first
    assert "`mltfr train --help mltfr.filter`" in first
    every = shown(capsys, "train", "--help", "all")
    for section in sections:
        fields = shown(capsys, "train", "--help", section)
        inside = [path for path in field_paths(RunConfig) if path.startswith(f"{section}.")]
        for path in inside:
            assert f" {path}  (" in fields or section_at(RunConfig, path), path
        assert fields.partition("\n")[2].strip() in every
    one = shown(capsys, "train", "--help", "mltfr.filter.top_k=3").split()
    assert one[:5] == ["mltfr.filter.top_k", "(int", "or", "null,", ">="]


@pytest.mark.parametrize(
    ("topic", "nearest"),
    [("mltfr.fliter", "mltfr.filter"), ("trainin", "training"), ("filter", "mltfr.filter")],
)
def test_an_unknown_section_names_the_nearest(
    topic: str, nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help", topic])
    assert ended.value.code == 2
    assert f"`{topic}` (the nearest is `{nearest}`)" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        topic_text(RunConfig, topic)


def test_bounds_of_a_list_stand_once() -> None:
    assert "(list of float, >= 0, < 1; default: [0.9, 0.98])" in topic_text(RunConfig, "optimizer")


# --- the command that was typed


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["sweep", "x.yaml", "a=1", "--hlep"],
            "mltfr sweep: error: unrecognized arguments: --hlep",
        ),
        (["sweep", "--hlep"], "mltfr sweep: error: "),
        (["train", "--hlep"], "mltfr train: error: unrecognized arguments: --hlep"),
        (["tables", "x", "--normalize=none"], "(did you mean --normalise?)"),
        (["sweeep"], "mltfr: error: "),
    ],
)
def test_errors_name_the_command(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert expected in message
    assert "train.py" not in message
    name = " ".join(["mltfr", *arguments[:1]]) if arguments[0] in COMMANDS else "mltfr"
    assert f"\n`{name} --help` lists" in message


@pytest.mark.parametrize(
    ("typed", "named"),
    [
        (["train.py"], "python train.py"),
        (["-m", "mltfr_dist.cli", "train"], "python -m mltfr_dist.cli train"),
    ],
    ids=["train.py", "module"],
)
def test_a_refused_configuration_names_the_help_that_lists_it(typed: list[str], named: str) -> None:
    done = subprocess.run(
        [sys.executable, *typed, "--preset", "smoke", "mltfr.router.topk=2"],
        env=clean_environment(),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert f"`{named} --help mltfr.router`" in done.stderr


@pytest.mark.parametrize(
    ("override", "topic"),
    [
        ("mltfr.filter.topk=2", "mltfr.filter"),
        ("training.epochs=-1", "training"),
        ("trainin.epochs=3", "training"),
        ("nam=x", "all"),
        ("mltfr.tables=[1]", "mltfr"),
        ("evaluation.cutoffs=[x]", "evaluation"),
    ],
)
def test_the_remedy_lists_the_section_of_the_fault(override: str, topic: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_config("smoke", None, [override])
    assert f"`mltfr train --help {topic}`" in caught.value.remedy
    assert topic_text(RunConfig, topic)


@pytest.mark.parametrize(
    ("started", "launcher", "plain", "launched"),
    [
        ("/x/train.py", "deepspeed", "python /x/train.py", "deepspeed /x/train.py"),
        ("train.py", "torchrun", "python train.py", "torchrun train.py"),
        ("/a b/train.py", "torchrun", "python '/a b/train.py'", "torchrun '/a b/train.py'"),
        ("train.py", "", "python train.py", "python train.py"),
        ("/bin/mltfr", "torchrun", "mltfr train", "mltfr train"),
        ("/bin/pytest", "", "mltfr train", "mltfr train"),
        ("-m mltfr_dist", "", "python -m mltfr_dist train", "python -m mltfr_dist train"),
        (
            "-m mltfr_dist.train",
            "torchrun",
            "python -m mltfr_dist.train",
            "torchrun -m mltfr_dist.train",
        ),
        (
            "-m mltfr_dist.train",
            "deepspeed",
            "python -m mltfr_dist.train",
            "deepspeed --module mltfr_dist.train",
        ),
    ],
)
def test_what_starts_a_run_is_named_as_it_was_typed(
    started: str, launcher: str, plain: str, launched: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "CROSS_SIZE"):
        monkeypatch.delenv(name, raising=False)
    if launcher:
        monkeypatch.setenv(
            {"torchrun": "TORCHELASTIC_RUN_ID", "deepspeed": "CROSS_SIZE"}[launcher], "1"
        )
    if started.startswith("-m "):
        monkeypatch.setattr(invocation, "_started", lambda: started)
    monkeypatch.setattr(sys, "argv", [started])
    assert invocation.command("train") == plain
    assert invocation.train_command() == launched
    assert parser_of("train").prog == plain
    assert parser_of("sweep").prog == invocation.command("sweep")


def test_no_message_knows_one_way_to_start_alone() -> None:
    """What names train.py in a message asks `invocation` instead; docstrings may name it."""
    from test_remedies import TEXTS

    assert [text for text in TEXTS if "train.py" in text.text] == []


def test_of_several_ranks_one_says_what_was_mistyped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", ERROR_FILE: str(tmp_path / "e")}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        train.main(["--hlep"])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("ConfigError: mltfr train: unrecognized arguments: --hlep (did you")
    assert len(message.splitlines()) == 1
    assert message.strip() in json.loads((tmp_path / "e").read_text())["message"]["message"]


def test_of_several_ranks_one_shows_the_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for arguments in (["--help"], ["--help", "mltfr"]):
        assert shown(capsys, *arguments, program="train.py") == ""
    assert train.main(["--preset", "smoke", "--print-config"]) == 0
    assert capsys.readouterr().out == ""


def test_help_of_a_sweep_goes_by_section(capsys: pytest.CaptureFixture[str]) -> None:
    """A line a field, then the fields of a section, and what a searched field's values can be."""
    shown = {}
    for topic in ("", "asha", "search", "all"):
        with pytest.raises(SystemExit) as ended:
            main(["sweep", "--help", *([topic] if topic else [])])
        assert ended.value.code == 0
        shown[topic] = capsys.readouterr().out
    assert "asha.grace_epochs" not in shown[""]
    assert "--help search" in shown[""]
    assert shown["asha"].startswith("asha: Early stopping.")
    assert "pbt." not in shown["asha"]
    assert "search.KEY.log_uniform" in shown["search"]
    assert "search.KEY.log_uniform" in shown["all"]
    assert "pbt.quantile" in shown["all"]
    with pytest.raises(SystemExit):
        main(["sweep", "--help", "abha"])
    assert "the nearest is `asha`" in capsys.readouterr().err
