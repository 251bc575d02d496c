"""A run's folder belongs to one configuration, and its records go on where the checkpoint
stands.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mltfr_dist.config import RunConfig
from mltfr_dist.errors import CheckpointError, ConfigError
from mltfr_dist.files import write_atomically
from mltfr_dist.presets import preset
from mltfr_dist.schema import validate
from mltfr_dist.training.origin import ORIGIN
from mltfr_dist.training.reporting.tracking import Tracker, drop_later_lines
from mltfr_dist.training.run_folder import (
    CHANGEABLE,
    CONFIG,
    RESULT,
    Result,
    claim,
    differing_fields,
    leaf_values,
    load_config,
    load_result,
)
from mltfr_dist.training.seeds import seed_all


def changed(**training: int) -> RunConfig:
    config = preset("demo")
    return config.model_copy(update={"training": config.training.model_copy(update=training)})


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("existing", [False, True])
def test_a_new_run_writes_its_configuration(tmp_path: Path, existing: bool) -> None:
    folder = tmp_path / "runs" / "demo"
    if existing:
        folder.mkdir(parents=True)
    claim(folder, preset("demo"), resume=True)
    assert list(contents(folder)) == [CONFIG, ORIGIN]
    assert load_config(folder) == preset("demo")


def test_the_same_run_goes_on(tmp_path: Path) -> None:
    claim(tmp_path / "r", preset("demo"), resume=True)
    before = contents(tmp_path / "r")
    claim(tmp_path / "r", preset("demo"), resume=True)
    assert contents(tmp_path / "r") == before


def test_a_different_run_is_refused_and_the_fields_named(tmp_path: Path) -> None:
    claim(tmp_path / "r", preset("demo"), resume=True)
    before = contents(tmp_path / "r")
    for resume in (True, False):
        with pytest.raises(ConfigError) as caught:
            claim(tmp_path / "r", changed(seed=7, epochs=31), resume=resume)
        message = str(caught.value)
        assert "training.seed is 0 there and 7 here" in message
        assert "training.epochs is 30 there and 31 here" in message
        assert "patience" not in message
        assert str(tmp_path / "r") in message
        assert "another `name`" in caught.value.remedy
    assert contents(tmp_path / "r") == before


CHANGES = {
    "deepspeed": "ds_configs/zero3.json",
    "mltfr.placement": "mmap",
    "training.threads": 3,
    "training.hang_seconds": 7.0,
    "training.log_every_steps": 3,
    "data.num_workers": 2,
    "checkpoint.every_steps": 5,
    "checkpoint.keep_last": 4,
    "runs_dir": "elsewhere",
}


def with_field(config: RunConfig, key: str, value: object) -> RunConfig:
    values = config.model_dump(mode="json")
    place = values
    for block in key.split(".")[:-1]:
        place = place[block]
    place[key.rpartition(".")[2]] = value
    return validate(RunConfig, values, source="a test")


@pytest.mark.parametrize("key", CHANGES)
def test_what_changes_no_number_may_differ(tmp_path: Path, key: str) -> None:
    claim(tmp_path / "r", preset("demo"), resume=True)
    config = with_field(preset("demo"), key, CHANGES[key])
    told = claim(tmp_path / "r", config, resume=True)
    assert load_config(tmp_path / "r") == config, "config.yaml says what the run has now"
    assert [text.partition(" is ")[0] for text in told] == [key] * (key != "runs_dir")
    with pytest.raises(ConfigError, match="already holds this run"):
        claim(tmp_path / "r", preset("demo"), resume=False)


def test_every_other_field_is_refused_by_name(tmp_path: Path) -> None:
    """Each field is one or the other, and new ones are refused until they are listed."""
    claim(tmp_path / "r", preset("demo"), resume=True)
    assert set(CHANGEABLE) < set(leaf_values(preset("demo")))
    for key, value in {
        "training.global_batch_size": 512,
        "training.micro_batch_size": 8,
        "training.precision": "bf16",
        "optimizer.learning_rate": 0.5,
        "evaluation.batch_size": 7,
        "data.max_len": 9,
    }.items():
        config = with_field(preset("demo"), key, value)
        mixed = with_field(config, "deepspeed", "ds_configs/zero3.json")
        with pytest.raises(ConfigError, match=f"different run: {key} is") as caught:
            claim(tmp_path / "r", mixed, resume=True)
        assert "zero3" not in str(caught.value), "only what is refused is named"
        assert "deepspeed, mltfr.placement" in caught.value.rule
    assert load_config(tmp_path / "r") == preset("demo")


def test_resume_never_refuses_the_same_run(tmp_path: Path) -> None:
    claim(tmp_path / "r", preset("demo"), resume=False)  # a new one is fine
    with pytest.raises(ConfigError, match="already holds this run") as caught:
        claim(tmp_path / "r", preset("demo"), resume=False)
    assert "--resume auto" in caught.value.remedy


@pytest.mark.parametrize("resume", [True, False])
def test_a_foreign_folder_is_refused_and_left_alone(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is not a run"):
        claim(tmp_path, preset("demo"), resume=resume)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no config\.yaml") as caught:
        load_config(tmp_path)
    assert "Name a run's folder" in caught.value.remedy


def test_a_stored_configuration_of_another_version_is_an_error_that_names_the_file(
    tmp_path: Path,
) -> None:
    claim(tmp_path / "r", preset("demo"), resume=True)
    path = tmp_path / "r" / CONFIG
    path.write_text(path.read_text() + "gone_field: 1\n")
    with pytest.raises(
        ConfigError, match=r"config\.yaml is not valid: `gone_field` is not a field"
    ):
        claim(tmp_path / "r", preset("demo"), resume=True)


def test_differing_fields_walks_both_trees() -> None:
    old = {"a": {"b": 1, "c": [1]}, "d": None}
    assert differing_fields(old, old) == []
    assert differing_fields(old, {"a": {"b": 2, "c": [1]}, "d": None}) == [
        "a.b is 1 there and 2 here"
    ]
    assert differing_fields(old, {"a": {"b": 1, "c": [1, 2]}, "d": {"e": 1}, "f": True}) == [
        "a.c is [1] there and [1, 2] here",
        'd is null there and {"e": 1} here',
        "f is null there and true here",
    ]


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    assert load_result(tmp_path) is None
    result = Result(
        name="mltfr",
        valid={"HR@10": 0.1},
        test={"HR@10": 0.05},
        seconds=1.5,
        stage="train",
        epoch=3,
        world_size=2,
    )
    write_atomically(tmp_path / RESULT, result.model_dump_json())
    assert load_result(tmp_path) == result
    assert list(contents(tmp_path)) == [RESULT]


# --- metrics.jsonl
# -----------------------------------------------------------------------------------------------


def line(stage: str, step: int, kind: str = "step") -> str:
    return json.dumps({"kind": kind, "stage": stage, "step": step, "loss": 1.0 / (step + 1)}) + "\n"


ALL = [
    ("train", 10),
    ("train", 20),
    ("train", 20),
    ("train", 30),
    ("consensus", 10),
    ("consensus", 20),
]


@pytest.mark.parametrize(
    ("stage", "step", "kept"),
    [
        ("train", 0, 0),
        ("train", 10, 1),
        ("train", 25, 3),
        ("train", 30, 4),
        ("consensus", 0, 4),
        ("consensus", 15, 5),
        ("consensus", 99, 6),
    ],
)
def test_later_lines_are_dropped(tmp_path: Path, stage: str, step: int, kept: int) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [line(*entry) for entry in ALL]
    path.write_text("".join(lines))
    drop_later_lines(path, stage, step)
    assert path.read_text() == "".join(lines[:kept])
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(line("train", 10) + line("train", 20)[:cut])
    drop_later_lines(path, "train", 50)
    assert path.read_text() == line("train", 10)


def test_no_records_yet_is_no_error(tmp_path: Path) -> None:
    drop_later_lines(tmp_path / "metrics.jsonl", "train", 0)
    assert not list(tmp_path.iterdir())


def test_a_tracker_goes_on_where_the_checkpoint_stands(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    tracker = Tracker(whole, active=True, stage="train", step=0)
    for step in (10, 20, 30):
        tracker.log("step", step, {"loss": 1.0 / step}, epoch=1)
    tracker.close()
    blocks = tmp_path / "parts"
    blocks.mkdir()
    tracker = Tracker(blocks, active=True, stage="train", step=0)
    for step in (10, 20):
        tracker.log("step", step, {"loss": 1.0 / step}, epoch=1)
    tracker.close()
    tracker = Tracker(blocks, active=True, stage="train", step=10)
    for step in (20, 30):
        tracker.log("step", step, {"loss": 1.0 / step}, epoch=1)
    tracker.close()
    assert (blocks / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    first = json.loads((whole / "metrics.jsonl").read_text().splitlines()[0])
    assert first == {"kind": "step", "stage": "train", "step": 10, "epoch": 1, "loss": 0.1}
    assert list((whole / "tb").iterdir())


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, active=False, stage="train", step=0)
    tracker.log("step", 1, {"loss": 1.0})
    tracker.board({"speed": 1.0}, 1)
    tracker.text("config", "x", 0)
    tracker.progress(1, 2, 3, 0.5)
    tracker.close()
    assert not list(tmp_path.iterdir())


def test_random_state_is_a_function_of_its_keys() -> None:
    import torch

    def draw(*keys: int) -> float:
        seed_all(*keys)
        return float(torch.rand(()))

    assert draw(1, 0, 5, 0) == draw(1, 0, 5, 0)
    assert (
        len(
            {
                draw(1, 0, 5, 0),
                draw(2, 0, 5, 0),
                draw(1, 1, 5, 0),
                draw(1, 0, 6, 0),
                draw(1, 0, 5, 1),
            }
        )
        == 5
    )
