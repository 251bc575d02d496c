"""When the trials of a population pause, and what each hands on then."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from support import tiny_config

from mltfr_dist.tuning.records import Record, Trial, Validation
from mltfr_dist.tuning.snapshots import KEPT, make_run, take_snapshot
from mltfr_dist.tuning.space import SweepConfig
from mltfr_dist.tuning.turns import Turns


def validations(*epochs: int) -> list[Validation]:
    return [Validation(epoch, {}) for epoch in epochs]


def test_turns_end_at_exchanges_and_with_the_trial(tmp_path: Path) -> None:
    base = tiny_config(tmp_path, training__epochs=7, training__consensus_epochs=2)
    pbt = SweepConfig.model_validate(
        {
            "name": "s",
            "preset": "smoke",
            "search": {"optimizer.learning_rate": {"choices": [0.1, 0.2]}},
            "scheduler": "pbt",
            "pbt": {"every_epochs": 3},
            "num_trials": 4,
        }
    )
    turns = Turns.of(pbt, base)
    assert [turns.end_after(n) for n in range(9)] == [3] * 3 + [6] * 3 + [None] * 3
    assert [turns.end_at(n) for n in range(9)] == [3] * 4 + [6] * 3 + [None] * 2
    assert [turns.ended(validations(*range(1, n + 1))) for n in range(5)] == [
        False,
        False,
        False,
        True,
        False,
    ]
    assert turns.ended(validations(2, 4)), "validated every second epoch, past an exchange"
    assert not turns.ended(validations(3, 3)), "the second stage validates before it trains"
    without = Turns.of(pbt.model_copy(update={"scheduler": "none"}), base)
    assert [without.end_after(n) for n in (0, 8, 9)] == [None] * 3
    assert not without.ended(validations(*range(1, 10)))


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    trial = Trial(tmp_path / "sweep", 3, Record(values={})).save()
    checkpoint = trial.folder / "checkpoints" / "train-step000000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_bytes(b"four")
    (trial.folder / "checkpoints" / ".partial-5").mkdir()
    (trial.folder / "metrics.jsonl").write_text("one\n")
    (trial.folder / "inputs.json").write_text("{}")
    return trial


def test_a_snapshot_stays_as_it_was(tmp_path: Path, trial: Trial) -> None:
    weights = trial.folder / "checkpoints" / "train-step000000004" / "weights"
    snapshot = take_snapshot(trial, 3)
    with (trial.folder / "metrics.jsonl").open("a") as file:
        file.write("two\n")
    assert weights.stat().st_nlink == 2, "linked, not copied"
    weights.unlink()
    config = tiny_config(tmp_path, name="0004-2", runs_dir=trial.folder.parent)
    make_run(config, snapshot)
    made = config.folder
    assert (made / "checkpoints" / "train-step000000004" / "weights").read_bytes() == b"four"
    assert (made / "metrics.jsonl").read_text() == "one\n"
    assert not (made / "checkpoints" / ".partial-5").exists()
    assert yaml.safe_load((made / "config.yaml").read_text())["name"] == "0004-2"


def test_few_snapshots_are_kept(trial: Trial) -> None:
    snapshots = [take_snapshot(trial, epochs) for epochs in (3, 6, 9, 12)]
    assert [snapshot.exists() for snapshot in snapshots] == [False] * (4 - KEPT) + [True] * KEPT
