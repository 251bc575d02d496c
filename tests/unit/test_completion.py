"""Shell completion, typed in real shells."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import REPOSITORY, clean_environment

from mltfr_dist.cli import build_parser
from mltfr_dist.cli.completion import SHELLS, script
from mltfr_dist.presets import PRESETS

COMPLETE = """
source "$1"; shift
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_mltfr
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completion")
    for shell in SHELLS:
        (folder / shell).write_text(script(shell, build_parser()))
    return folder


def completed(scripts: Path, *words: str) -> list[str]:
    """What bash offers for the last of ``words``."""
    done = subprocess.run(
        ["bash", "-c", COMPLETE, "bash", str(scripts / "bash"), *words],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "result"),
    [
        (["ev"], {"evaluate"}),
        (["train", "--pr"], {"--preset", "--print-config"}),
        (["train", "--preset", ""], set(PRESETS)),
        (["train", "--preset", "sm"], {"smoke"}),
        (["train", "--preset", "smoke", "training.ep"], {"training.epochs="}),
        (["train", "name=x", "--resume", ""], {"auto", "never"}),
        (["sweep", "de"], {"demo"}),
        (["evaluate", "--split", "t"], {"test"}),
        (["prepare", "--k", ""], set()),
        (["--comp"], {"--completion"}),
        (["--completion", "z"], {"zsh"}),
    ],
)
def test_bash_completes(scripts: Path, words: list[str], result: set[str]) -> None:
    offered = set(completed(scripts, "mltfr", *words))
    assert offered >= result
    if result:
        assert all(word.startswith(words[-1]) for word in offered)


def test_every_command_and_option_is_there(scripts: Path) -> None:
    offered = completed(scripts, "mltfr", "")
    (commands,) = (a.choices for a in build_parser()._actions if a.dest == "command")
    assert commands is not None
    assert set(offered) >= set(commands)
    for name in commands:
        assert "--help" in completed(scripts, "mltfr", name, "--h")
    assert "--local_rank" not in completed(scripts, "mltfr", "train", "--")


def test_bash_completes_as_readline_does(scripts: Path) -> None:
    """`complete` knows the function, and falls back to file names."""
    done = subprocess.run(
        ["bash", "-c", f"source {scripts / 'bash'}; complete -p mltfr"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "-o default" in done.stdout
    assert "-F _mltfr" in done.stdout


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_take_the_script(scripts: Path, shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed here")
    if shell == "fish":
        program = f"source {scripts / shell}; complete -C 'mltfr train --preset sm'"
    else:
        program = f"""
            autoload -U +X compinit && compinit -u -D; source {scripts / shell}
            () {{  # as bashcompinit calls it; zsh then leaves out what does not begin as typed
                emulate -L sh; setopt kshglob noshglob braceexpand
                COMP_WORDS=(mltfr train --preset sm) COMP_CWORD=3
                _mltfr; echo "${{COMPREPLY[@]}}"
            }}"""
    done = subprocess.run([shell, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "smoke" in done.stdout


def test_the_command_prints_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mltfr_dist", "--completion", "bash"],
        env=clean_environment(),
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == script("bash", build_parser())
