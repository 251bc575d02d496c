"""Checkpoints that are damaged or cut off are passed over; what is kept is what the configuration
says.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from support import read_lines, tiny_config

import train
from mltfr_dist.cli import main as mltfr
from mltfr_dist.config import RunConfig
from mltfr_dist.distributed import checkpoint
from mltfr_dist.distributed.checkpoint import (
    HEADER,
    MODEL,
    OPTIMIZER,
    Progress,
    read,
    read_header,
    step_folder,
    validated_folder,
    write,
)
from mltfr_dist.distributed.kept import best_intact, latest, latest_intact, prune
from mltfr_dist.distributed.meeting import stop_ranks
from mltfr_dist.errors import CheckpointError, DamagedError
from mltfr_dist.files import write_atomically
from mltfr_dist.training.run_folder import load_result
from mltfr_dist.training.running.fit import fit


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
    [(MODEL, flip), (OPTIMIZER, truncate), (OPTIMIZER, Path.unlink), (HEADER, truncate)],
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


def remove(path: Path) -> None:
    shutil.rmtree(path)


def put(folder: Path, step: int, best: tuple[tuple[int, float], ...]) -> Progress:
    progress = Progress(stage="train", step=step, epoch=step, best=best)
    write(
        step_folder(folder, progress),
        {MODEL: {"w": torch.ones(2)}, OPTIMIZER: {"w": torch.ones(2)}},
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


def test_keep_best_keeps_the_best_validations_and_the_next_takes_the_place_of_a_lost_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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

    first = load_result(config.folder)
    assert first is not None
    assert first.valid["NDCG@10"] == ranked[0]["NDCG@10"]
    remove(config.folder / "checkpoints" / f"train-best{ranked[0]['epoch']:05d}")
    (config.folder / "result.json").unlink()
    capsys.readouterr()
    fit(config)
    result, is_last = load_result(config.folder), ranked[0]["epoch"] == 4
    assert result is not None
    kept_ones = ranked[0] if is_last else ranked[1]
    assert (result.valid["NDCG@10"], result.epoch) == (kept_ones["NDCG@10"], kept_ones["epoch"])
    assert result.checkpoint.startswith("train-step" if is_last else "train-best")
    said = capsys.readouterr().out
    for line in (ranked[0], kept_ones):
        assert f"(validation NDCG@10 {line['NDCG@10']:.4f})" in said


def test_a_damaged_leftover_is_not_kept_in_place_of_a_new_checkpoint(tmp_path: Path) -> None:
    """A run that passed over step 6, damaged, saves at step 4, which must stay."""
    put(tmp_path, 6, ())
    truncate(tmp_path / "train-step000000006" / HEADER)
    prune(tmp_path, put(tmp_path, 4, ()), keep_last=1)
    assert latest_intact(tmp_path, "train", lambda _: None) == tmp_path / "train-step000000004"


# --- the best checkpoint --------------------------------------------------------------------------


def damage_model(path: Path) -> None:
    flip(path / MODEL)


def damage_header(path: Path) -> None:
    truncate(path / HEADER)


def copied(finished: RunConfig, folder: Path) -> RunConfig:
    """The finished run in another place, its outcome still to be chosen."""
    config = finished.model_copy(update={"runs_dir": folder})
    shutil.copytree(finished.folder, config.folder)
    (config.folder / "result.json").unlink()
    return config


@pytest.mark.parametrize("spoil", [remove, damage_model, damage_header])
def test_a_lost_best_checkpoint_is_replaced_and_named(
    finished: RunConfig,
    tmp_path: Path,
    spoil: Callable[[Path], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = load_result(finished.folder)
    assert expected is not None
    config = copied(finished, tmp_path)
    checkpoints = config.folder / "checkpoints"
    # The last epoch's checkpoint holds the same weights as the best, if that was the last.
    spoil(checkpoints / expected.checkpoint)
    fit(config)
    said = capsys.readouterr().out
    result = load_result(config.folder)
    assert result is not None
    assert f"the best checkpoint {expected.checkpoint} (validation NDCG@10" in said
    assert "holds the same weights" in said
    assert result.test == expected.test
    assert (result.stage, result.epoch) == (expected.stage, expected.epoch)


def test_every_validated_checkpoint_lost_leaves_the_last(tmp_path: Path) -> None:
    progress = put(tmp_path, 3, ((2, 0.3), (1, 0.2)))
    said: list[str] = []
    assert best_intact(tmp_path, {"train": progress}, said.append).name == "train-best00002"
    assert not said
    remove(tmp_path / "train-best00002")
    assert best_intact(tmp_path, {"train": progress}, said.append).name == "train-best00001"
    assert "train-best00001 (validation NDCG@10 0.2000) is the best that is left" in said.pop()
    damage_header(tmp_path / "train-best00001")
    choice = best_intact(tmp_path, {"train": progress}, said.append)
    assert (choice.name, choice.epoch, choice.value) == ("train-step000000003", 3, None)
    assert "train-best00002 (validation NDCG@10 0.3000) is missing or damaged" in said.pop()
    flip(tmp_path / "train-step000000003" / MODEL)
    with pytest.raises(CheckpointError, match=r"No checkpoint in .* is whole") as error:
        best_intact(tmp_path, {"train": progress}, said.append)
    assert f"delete {tmp_path}" in error.value.remedy


def test_the_next_best_may_be_of_the_other_stage_or_one_that_was_outdone(tmp_path: Path) -> None:
    first = put(tmp_path, 2, ((2, 0.30),))
    outdone = Progress(stage="train", step=1, epoch=1, best=((1, 0.25),))
    write(validated_folder(tmp_path, "train", 1), {MODEL: {"w": torch.ones(2)}}, outdone)
    second = Progress(stage="consensus", step=1, epoch=1, best=((1, 0.30),))
    write(validated_folder(tmp_path, "consensus", 1), {MODEL: {"w": torch.ones(2)}}, second)
    outcomes = {"train": first, "consensus": second}
    names = []
    for _ in range(4):
        names.append(best_intact(tmp_path, outcomes, lambda _: None).name)
        remove(tmp_path / names[-1])
    assert names == [
        "consensus-best00001",  # of equal figures the later stage's
        "train-best00002",
        "train-step000000002",  # the same weights
        "train-best00001",
    ]


def test_stage_two_begins_from_what_is_left_of_stage_one(
    finished: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = copied(finished, tmp_path)
    checkpoints = config.folder / "checkpoints"
    for path in [*checkpoints.glob("consensus-*"), checkpoints / "fisher"]:
        remove(path)
    best = read_header(latest(checkpoints, "train")).progress.best_epoch  # type: ignore[arg-type]
    remove(validated_folder(checkpoints, "train", best))
    fit(config)
    said = capsys.readouterr().out
    assert said.count(f"the best checkpoint train-best{best:05d} (validation") >= 2
    assert "Fisher information" in said
    assert load_result(config.folder) is not None


def test_a_damaged_consensus_expert_is_made_again(
    finished: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = copied(finished, tmp_path)
    fisher = config.folder / "checkpoints" / "fisher"
    before = read_header(fisher).sha256
    flip(fisher / "core.safetensors")
    fit(config)
    assert "the consensus expert is made again" in capsys.readouterr().out
    assert read_header(fisher).sha256 == before
    again, before_it = load_result(config.folder), load_result(finished.folder)
    assert again is not None
    assert before_it is not None
    assert (again.test, again.valid) == (before_it.test, before_it.valid)


def test_the_remedy_of_a_finished_run_without_its_checkpoint_works(
    finished: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = copied(finished, tmp_path)
    text = (config.folder / "config.yaml").read_text()
    (config.folder / "config.yaml").write_text(text.replace(str(finished.runs_dir), str(tmp_path)))
    result = load_result(finished.folder)
    assert result is not None
    write_atomically(config.folder / "result.json", result.model_dump_json())
    remove(config.folder / "checkpoints" / result.checkpoint)
    capsys.readouterr()
    assert mltfr(["evaluate", str(config.folder)]) == 2
    message = capsys.readouterr().err
    assert message.count("cannot be used") == 1
    assert f"delete {config.folder / 'result.json'}" in message
    (config.folder / "result.json").unlink()
    command = message.partition("`mltfr train ")[2].partition("`")[0].split()
    assert train.main(command) == 0
    assert "holds the same weights" in capsys.readouterr().out
    assert mltfr(["evaluate", str(config.folder)]) == 0
    assert json.loads(capsys.readouterr().out) == result.test


def test_what_cannot_be_read_is_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that the system does not hand out may be whole: the run must not begin anew."""
    put(tmp_path, 1, ())

    def denied(*_: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(checkpoint, "file_sha256", denied)
    with pytest.raises(CheckpointError, match="cannot be read: Permission denied") as error:
        latest_intact(tmp_path, "train", pytest.fail)
    assert not isinstance(error.value, DamagedError)


def test_a_full_disk_keeps_what_was_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    progress = put(tmp_path, 1, ())

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(CheckpointError, match=r"could not be written: .*No space left"):
        write(step_folder(tmp_path, progress), {MODEL: {"w": torch.ones(2)}}, progress)
    assert [path.name for path in tmp_path.iterdir()] == ["train-step000000001"]
    assert read(tmp_path / "train-step000000001")
