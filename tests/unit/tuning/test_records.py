"""What a sweep's folder says of its trials, what schedulers are told of it, and the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mltfr_dist.config import RunConfig
from mltfr_dist.errors import CheckpointError, MltfrError
from mltfr_dist.schema import validate
from mltfr_dist.training.reporting.hparams import SESSION, write_session
from mltfr_dist.training.run_folder import RESULT, Result
from mltfr_dist.tuning import report
from mltfr_dist.tuning.hparams import write_all
from mltfr_dist.tuning.records import (
    Record,
    Trial,
    load_trial,
    load_trials,
    read_validations,
)
from mltfr_dist.tuning.schedulers import Asha, make_scheduler
from mltfr_dist.tuning.space import SweepConfig

RATE, LAYERS = "optimizer.learning_rate", "backbone.num_layers"


def sweep_of(folder: Path, **changes: Any) -> SweepConfig:
    values = {
        "name": "s",
        "sweeps_dir": str(folder),
        "preset": "smoke",
        "search": {RATE: {"log_uniform": [1e-4, 1e-1]}, LAYERS: {"choices": [1, 2]}},
        "num_trials": 8,
        "asha": {"grace_epochs": 1, "reduction_factor": 2},
        **changes,
    }
    return validate(SweepConfig, values, source="a test")


def lines(*values: float, stage: str = "train") -> str:
    result = [{"kind": "step", "stage": stage, "step": 1, "loss": 1.0}]
    result += [
        {"kind": "valid", "stage": stage, "step": e, "epoch": e, "NDCG@10": v, "HR@10": 2 * v}
        for e, v in enumerate(values, 1)
    ]
    return "".join(json.dumps(line) + "\n" for line in result)


def trial_of(
    sweep: SweepConfig,
    number: int,
    rate: float,
    layers: int,
    *values: float,
    finished: bool = False,
) -> Trial:
    trial = Trial(sweep.folder, number, Record(values={RATE: rate, LAYERS: layers})).save()
    trial.folder.mkdir(parents=True)
    (trial.folder / "metrics.jsonl").write_text(lines(*values))
    if finished:
        valid = {"NDCG@10": max(values), "HR@10": 2 * max(values)}
        (trial.folder / RESULT).write_text(
            Result(name="m", valid=valid, test={}, seconds=1).model_dump_json()
        )
    return trial


def test_states_are_read_from_the_files(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path)
    finished = trial_of(sweep, 0, 0.01, 1, 0.1, 0.3, 0.2, finished=True)
    stopped = trial_of(sweep, 1, 0.01, 2, 0.05).end("stopped", "asha after epoch 1")
    failed = (
        Trial(sweep.folder, 2, Record(values={RATE: 1e-3, LAYERS: 1}))
        .save()
        .end("failed", "no such table")
    )
    begun = trial_of(sweep, 3, 0.02, 1, 0.15)
    loaded = load_trials(sweep.folder)
    assert [trial.state for trial in loaded] == ["finished", "stopped", "failed", "unfinished"]
    assert loaded == [finished, stopped, failed, begun]
    assert [trial.best("NDCG@10") for trial in loaded] == [0.3, 0.05, None, 0.15]
    assert [v.epoch for v in finished.validations()] == [1, 2, 3]
    (sweep.folder / "trials" / "0003.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"0003.json is damaged"):
        load_trials(sweep.folder)


def test_a_generation_is_a_run_of_its_own(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path)
    first = trial_of(sweep, 0, 0.01, 1, 0.1)
    second = first.next_generation({RATE: 0.02, LAYERS: 1}).save()
    assert second.name == "0000-2"
    assert second.folder != first.folder
    assert load_trial(sweep.folder, 0) == second


def test_epochs_run_on_over_the_stages_and_a_cut_line_is_left(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(lines(0.1, 0.2) + lines(0.3, stage="consensus") + '{"kind": "valid", "sta')
    assert [(v.epoch, v.metrics["NDCG@10"]) for v in read_validations(path)] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.3),
    ]
    assert read_validations(tmp_path / "nowhere") == []


class FakeTrial:
    """What the scheduler reads of Tune's trial."""

    def __init__(self, number: int) -> None:
        self.trial_id = f"new-{number}"
        self.config: dict[str, Any] = {"trial": number}


def test_successive_halving_remembers_an_earlier_start(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path)
    for number, best in enumerate((0.2, 0.3, 0.4)):
        trial_of(sweep, number, 0.01, 1, best, finished=True)
    begun = trial_of(sweep, 3, 0.01, 1, 0.35)
    bad: Any = FakeTrial(9)

    def decides(scheduler: Asha, epoch: int, value: float, trial: Any) -> str:
        return str(scheduler.on_trial_result(None, trial, {"epoch": epoch, "objective": value}))

    fresh, told = (
        Asha(sweep, 8, trials, base_first=True) for trials in ([], load_trials(sweep.folder))
    )
    for scheduler in (fresh, told):
        scheduler.on_trial_add(None, bad)
    assert decides(fresh, 1, 0.1, bad) == "CONTINUE", "the first of its rung"
    assert decides(told, 1, 0.1, bad) == "STOP", "below the median of those before"
    again: Any = FakeTrial(begun.number)
    told.on_trial_add(None, again)
    assert decides(told, 1, 0.35, again) == "CONTINUE", "it was decided in the earlier start"
    base: Any = FakeTrial(0)
    told.on_trial_add(None, base)
    assert decides(told, 2, 0.01, base) == "CONTINUE", (
        "what the others must beat gets its full time"
    )
    assert type(make_scheduler(sweep, base_of(), [])).__name__ == "Asha"


def test_a_population_keeps_numbers_and_stays_in_the_space(tmp_path: Path) -> None:
    search = {RATE: {"log_uniform": [1e-4, 1e-1]}, "backbone.dropout": {"choices": [0.1, 0.2, 0.3]}}
    population: Any = make_scheduler(
        sweep_of(tmp_path, search=search, scheduler="pbt"), base_of(), []
    )
    weak, strong = FakeTrial(3), FakeTrial(5)
    for trial in (weak, strong):
        trial.config |= {"generation": 0, RATE: 0.095, "backbone.dropout": 0.2}
    seen = [population._get_new_config(weak, strong)[0] for _ in range(50)]
    assert {(config["trial"], config["generation"]) for config in seen} == {(3, 1)}
    assert all(1e-4 <= config[RATE] <= 1e-1 for config in seen)
    assert len({config[RATE] for config in seen}) > 1
    assert {config["backbone.dropout"] for config in seen} <= {0.1, 0.2, 0.3}


def base_of() -> RunConfig:
    from mltfr_dist.presets import preset

    return preset("smoke")


def test_the_report_ranks_explains_and_names_the_command(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path)
    for number in range(8):  # layers make all the difference; the rate none
        layers = 1 + number % 2
        trial_of(
            sweep,
            number,
            10 ** (-4 + 0.4 * number),
            layers,
            0.1 * layers,
            0.1 * layers + 0.001 * number,
            finished=True,
        )
    trial_of(sweep, 8, 0.01, 1, 0.05).end("stopped", "asha after epoch 1")
    Trial(sweep.folder, 9, Record(values={RATE: 1e-3, LAYERS: 1})).save().end(
        "failed", "out of memory"
    )
    trials = load_trials(sweep.folder)
    best = report.choose(sweep, trials)
    assert best.number == 7
    report.write_best(sweep, base_of(), best)
    written = validate(
        RunConfig, yaml.safe_load((sweep.folder / "best.yaml").read_text()), source="best.yaml"
    )
    assert written.backbone.num_layers == 2
    assert written.name == "s-best"
    text = report.write(sweep, trials, []).read_text()
    assert "| 0007 | 0.2070 |" in text
    assert text.index("| 0007 |") < text.index("| 0005 |") < text.index("| 0008 |")
    assert "stopped by asha after epoch 1" in text
    assert "- Trial 0009: out of memory" in text
    assert f"train.py --config {sweep.folder / 'best.yaml'}" in text
    assert "the test split is unread" in text
    assert report.importance(sweep, LAYERS, trials[:8], 1) > 0.95
    assert report.importance(sweep, RATE, trials[:8], 1) < 0.5
    assert report.common_epoch(trials) == 1, "compared after as many epochs as all have"
    for name in ("parallel.png", "effects.png"):
        assert (sweep.folder / name).read_bytes().startswith(b"\x89PNG")


def test_a_sweep_without_any_success_says_why(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path)
    Trial(sweep.folder, 0, Record(values={RATE: 1e-3, LAYERS: 1})).save().end(
        "failed", "no such file"
    )
    with pytest.raises(MltfrError, match=r"None of the 1 trials of `s` succeeded: no such file"):
        report.choose(sweep, load_trials(sweep.folder))


def load_board(trial: Trial) -> EventAccumulator:
    return EventAccumulator(str(trial.folder / SESSION)).Reload()


def test_hparams_hold_the_searched_fields_and_the_outcome(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path)
    trial = trial_of(sweep, 0, 0.01, 2, 0.1, 0.3, finished=True)
    failed = Trial(sweep.folder, 1, Record(values={RATE: 1e-3, LAYERS: 1})).save()
    failed = failed.end("failed", "no such table")
    begun = trial_of(sweep, 2, 0.02, 1, 0.15)
    write_all([trial, failed, begun])
    write_all([trial, failed, begun])  # nothing twice
    assert not (begun.folder / SESSION).exists()
    assert len(list((failed.folder / SESSION).iterdir())) == 1
    assert [s.value for s in load_board(failed).Scalars("sweep/epochs")] == [0]
    board = load_board(trial)
    assert [round(s.value, 4) for s in board.Scalars("sweep/best_NDCG@10")] == [0.3]
    plugin = board.PluginTagToContent("hparams")
    assert "_hparams_/session_start_info" in plugin
    assert RATE.encode() in plugin["_hparams_/session_start_info"]


def test_a_session_that_was_cut_off_is_written_again(tmp_path: Path) -> None:
    trial = trial_of(sweep_of(tmp_path), 0, 0.01, 2, 0.1, finished=True)
    with pytest.raises(ValueError, match="many"):  # as a kill in the middle of its metrics
        write_session(trial.folder, {RATE: 0.01}, {"a": 1.0, "b": "many"}, 1)  # type: ignore[dict-item]
    assert not (trial.folder / SESSION).exists()
    write_all([trial])
    assert [s.value for s in load_board(trial).Scalars("sweep/epochs")] == [1]


def test_a_failed_trial_goes_on_when_it_is_told_to(tmp_path: Path) -> None:
    failed = trial_of(sweep_of(tmp_path), 0, 0.01, 1, 0.1).end("failed", "no room")
    failed.failure.write_text("no room")
    again = failed.again()
    assert again.state == "unfinished"
    assert not again.failure.exists()
    assert load_trials(failed.sweep) == [again]
