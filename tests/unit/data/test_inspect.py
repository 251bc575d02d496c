"""`mltfr inspect` on data worked by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mltfr_dist.cli import main as mltfr
from mltfr_dist.config import PrepareConfig
from mltfr_dist.data.inspect.report import gather, moment
from mltfr_dist.data.prepare.run import prepare

ROWS = [("ann", item) for item in "xyxzw"] + [("bob", item) for item in "yxyz"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    lines = [
        f"{user},{item},{1_700_000_000 + 60 * minute}\n"
        for minute, (user, item) in enumerate([*ROWS, ROWS[-1]])
    ]
    lines[-1] = lines[-2]  # one exact duplicate
    (tmp_path / "raw.csv").write_text("user_id,item_id,timestamp\n" + "".join(lines))
    prepare(
        str(tmp_path / "raw.csv"),
        tmp_path / "data",
        PrepareConfig(user_core=1, item_core=1),
        log=lambda _: None,
    )
    return tmp_path / "data"


def test_facts(folder: Path) -> None:
    facts = gather(
        folder
    )  # training: ann x y x, bob y x; validation targets z, y; test targets w, z
    assert facts.counts.tolist() == [3, 2, 0, 0]
    assert facts.cold == {"valid": (1, 2), "test": (2, 2)}
    assert facts.repeats == 1
    assert facts.lengths["train"].tolist() == [0, 0, 1, 1]


def test_table_plots_and_board(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mltfr(["inspect", str(folder), "--output", str(tmp_path / "shown")]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for block in (
        "users 2",
        "interactions 9 of 10 read",
        "duplicates dropped 1 (exact)",
        "time range 2023-11-14 22:13 UTC to 2023-11-14 22:21 UTC",
        "2 items never in it",
        "test 2 9 4 4.5 5 1 2 (100.00%)",
    ):
        assert block in text
    for name in ("lengths.png", "popularity.png"):
        with Image.open(tmp_path / "shown" / name) as image:
            assert image.size == (720, 440)
            assert (
                len(np.unique(np.asarray(image).reshape(-1, 3), axis=0)) > 3
            )  # axes, grid and a curve
    board = EventAccumulator(str(tmp_path / "shown")).Reload()
    assert sorted(board.Tags()["images"]) == ["data/lengths", "data/popularity"]
    assert "data/facts/text_summary" in board.Tags()["tensors"]


def test_damage_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray((folder / "valid-000000.tar").read_bytes())
    content[600] ^= 1
    (folder / "valid-000000.tar").write_bytes(content)
    assert mltfr(["inspect", str(folder)]) == 2
    assert "valid-000000.tar is damaged" in capsys.readouterr().err


def test_times_that_are_moments_are_shown_as_such() -> None:
    assert (
        moment("1700000000")
        == moment("1700000000000")
        == moment("1700000000000000")
        == "2023-11-14 22:13 UTC"
    )
    assert moment("17") == "17"
