"""docs/tutorial.md typed in its order in an empty folder, with less training."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import REPOSITORY, clean_environment

TUTORIAL = (REPOSITORY / "docs" / "tutorial.md").read_text()
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w*)\n(.*?)^```$", TUTORIAL, re.M | re.S)
LESS = (
    (
        "training.epochs=5 training.consensus_epochs=2",
        "training.epochs=1 training.consensus_epochs=1 backbone.hidden_dim=16 training.threads=1",
    ),
    ("training.epochs: 3", "training.epochs: 1"),
)
"""What is typed, and what stands there in the test."""


def test_every_block_is_typed() -> None:
    assert {language for language, _ in BLOCKS} == {"python", "bash"}
    assert len(BLOCKS) > 8
    for before, _ in LESS:
        assert before in TUTORIAL


@pytest.mark.integration
@pytest.mark.timeout(1200)
def test_the_tutorial_runs_as_written(tmp_path: Path) -> None:
    programs = str(Path(sys.executable).parent)
    environment = clean_environment(PATH=f"{programs}{os.pathsep}{os.environ['PATH']}")
    said = ""
    for language, text in BLOCKS:
        for before, instead in LESS:
            text = text.replace(before, instead)
        start = [sys.executable] if language == "python" else ["bash", "-euo", "pipefail"]
        done = subprocess.run(
            [*start, "-c", text], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        said += done.stdout
    for line in ("sasrec + MLTFR", "nearest to ' scarf'", "## What each field does", "gate 1.00"):
        assert line in said
    assert "2 users, up to 5 items each" in said
    assert "1 id left out" in done.stdout
    assert "shop-random (control: random)" in (tmp_path / "shop.html").read_text()
    last = done.stdout.splitlines()[-5:]
    assert all(re.match(r"sku-\d+ \w+ \w+ -?\d+\.\d+$", line) for line in last)
