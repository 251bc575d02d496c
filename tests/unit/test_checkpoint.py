"""Checkpoints that are damaged or cut off are passed over; what is kept is what the configuration says."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support import read_lines, tiny_config

from mltfr_dist.config import RunConfig
from mltfr_dist.distributed.checkpoint import (
    HEADER,
    MODEL,
    MOMENTS,
    Progress,
    read,
    read_header,
    step_folder,
    validated_folder,
    write,
)
from mltfr_dist.distributed.kept import latest, latest_intact, prune
from mltfr_dist.distributed.ranks import stop_ranks
from mltfr_dist.errors import DamagedError
from mltfr_dist.training.fit import fit


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunConfig]:
    folder = tmp_path_factory.mktemp("checkpoints")
    config = tiny_config(
        folder,
        training__epochs=2,
        training__consensus_epochs=1,
        checkpoint__every_steps=3,
        checkpoint__keep_last=2,
    )
    fit(config)
    yield config
    stop_ranks()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("file", "damage"),
    [(MODEL, flip), (MOMENTS, truncate), (MOMENTS, Path.unlink), (HEADER, truncate)],
    ids=["bit flipped", "cut off", "missing", "header cut off"],
)
def test_a_damaged_checkpoint_is_passed_over(
    finished: RunConfig,
    tmp_path: Path,
    file: str,
    damage: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = finished
    copy = config.model_copy(update={"runs_dir": tmp_path})
    shutil.copytree(config.folder, copy.folder)
    text = (copy.folder / "config.yaml").read_text()
    (copy.folder / "config.yaml").write_text(text.replace(str(config.runs_dir), str(tmp_path)))
    (copy.folder / "result.json").unlink()
    checkpoints = copy.folder / "checkpoints"
    newest = latest(checkpoints, "consensus")
    assert newest is not None
    damage(newest / file)
    cut = checkpoints / ".partial-consensus-step000000099"
    cut.mkdir()
    (cut / MODEL).write_bytes(b"half")
    fit(copy)
    said = capsys.readouterr().out
    assert f"skipping the checkpoint {newest.name}" in said
    assert "going on from consensus-step" in said
    assert "the save of consensus-step000000099 was interrupted" in said
    assert not cut.exists()
    assert read_lines(copy.folder / "metrics.jsonl") == read_lines(config.folder / "metrics.jsonl")
    for stage in ("train", "consensus"):
        made, again = latest(config.folder / "checkpoints", stage), latest(checkpoints, stage)
        assert made is not None
        assert again is not None
        assert read_header(again).sha256 == read_header(made).sha256


def put(folder: Path, step: int, best: tuple[tuple[int, float], ...]) -> Progress:
    progress = Progress(stage="train", step=step, epoch=step, best=best)
    write(
        step_folder(folder, progress),
        {MODEL: {"w": torch.ones(2)}, MOMENTS: {"w": torch.ones(2)}},
        progress,
    )
    for epoch, _ in best:
        write(validated_folder(folder, "train", epoch), {MODEL: {"w": torch.ones(2)}}, progress)
    return progress


def test_what_a_kept_checkpoint_names_as_best_is_kept(tmp_path: Path) -> None:
    put(tmp_path, 1, ((1, 0.1),))
    put(tmp_path, 2, ((2, 0.2),))
    prune(tmp_path, put(tmp_path, 3, ((3, 0.3),)), keep_last=2)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [
        "train-best00002",
        "train-best00003",
        "train-step000000002",
        "train-step000000003",
    ]


def test_none_intact_is_none(tmp_path: Path) -> None:
    warnings: list[str] = []
    assert latest_intact(tmp_path, "train", warnings.append) is None
    assert not warnings
    put(tmp_path, 1, ())
    flip(tmp_path / "train-step000000001" / MODEL)
    with pytest.raises(DamagedError, match=MODEL):
        read(tmp_path / "train-step000000001")
    assert latest_intact(tmp_path, "train", warnings.append) is None
    assert len(warnings) == 1


def test_keep_best_keeps_the_best_validations(tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path,
        checkpoint__keep_best=2,
        training__epochs=4,
        training__patience=9,
        mltfr__consensus__enabled=False,
        optimizer__learning_rate=0.03,
    )
    fit(config)
    lines = [
        line for line in read_lines(config.folder / "metrics.jsonl") if line["kind"] == "valid"
    ]
    assert len(lines) == 4
    ranked = sorted(lines, key=lambda line: (-line["NDCG@10"], line["epoch"]))
    kept = {path.name for path in (config.folder / "checkpoints").glob("train-best*")}
    assert {f"train-best{line['epoch']:05d}" for line in ranked[:2]} <= kept
    last = latest(config.folder / "checkpoints", "train")
    assert last is not None
    assert read_header(last).progress.best == tuple(
        (line["epoch"], line["NDCG@10"]) for line in ranked[:2]
    )
