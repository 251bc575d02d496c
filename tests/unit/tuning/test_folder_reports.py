"""`mltfr report` of every kind of folder; what is not finished names the command that goes on with
it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from support import tiny_config

from mltfr_dist.cli import main
from mltfr_dist.errors import CheckpointError, ConfigError
from mltfr_dist.training.run_folder import CONFIG, REPORT, RESULT, Result, dump_config
from mltfr_dist.tuning.folders import folder_report
from mltfr_dist.tuning.records import Record, Trial


def make_run(folder: Path, *, finished: bool, test: bool = True) -> Path:
    folder.mkdir(parents=True)
    (folder / CONFIG).write_text(dump_config(tiny_config(folder)))
    if finished:
        values = {"NDCG@10": 0.25, "HR@10": 0.5}
        result = Result(
            name="m", valid=values, test=values if test else {}, seconds=3, epoch=2, epochs=4
        )
        (folder / RESULT).write_text(result.model_dump_json())
    return folder


def test_a_run_shows_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", finished=True)
    (run / REPORT).write_text("# the report\n")
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == "# the report\n"


def test_a_backbone_and_a_trial_show_their_result(tmp_path: Path) -> None:
    backbone = make_run(tmp_path / "run" / "backbone", finished=True)
    assert "| NDCG@10 | 0.250000 | 0.250000 |" in folder_report(backbone)
    trial = make_run(tmp_path / "sweep" / "trials" / "0001", finished=True, test=False)
    assert "| HR@10 | 0.500000 | not read |" in folder_report(trial)


def test_an_unfinished_run_names_what_goes_on_with_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", finished=False)
    with pytest.raises(ConfigError, match=r"0 epochs.*mltfr train --config \S+/run/config\.yaml`"):
        folder_report(run)
    backbone = make_run(run / "backbone", finished=False)
    with pytest.raises(ConfigError, match=r"mltfr train --config \S+/run/config\.yaml`"):
        folder_report(backbone)


def test_an_unfinished_trial_sends_to_its_sweep(tmp_path: Path) -> None:
    trial = make_run(tmp_path / "sweep" / "trials" / "0001", finished=False)
    (tmp_path / "sweep" / "sweep.yaml").write_text("name: sweep\n")
    with pytest.raises(
        ConfigError, match=r"would read the test split.*mltfr sweep \S+/sweep\.yaml`"
    ):
        folder_report(trial)
    with pytest.raises(ConfigError, match=r"The sweep .* not finished: 0 trials \(none begun\)"):
        folder_report(tmp_path / "sweep")


@pytest.mark.parametrize(
    ("state", "reason", "message"),
    [
        ("stopped", "asha after epoch 1", r"stopped early \(asha after epoch 1\).*mltfr report"),
        ("failed", "ConfigError: no.", r"failed \(ConfigError: no\).*sweep\.yaml --retry-failed`"),
    ],
)
def test_a_trial_that_is_over_without_a_result_says_why(
    tmp_path: Path, state: Literal["stopped", "failed"], reason: str, message: str
) -> None:
    folder = make_run(tmp_path / "sweep" / "trials" / "0001", finished=False)
    (tmp_path / "sweep" / "sweep.yaml").write_text("name: sweep\n")
    Trial(tmp_path / "sweep", 1, Record(values={})).save().end(state, reason)
    with pytest.raises(ConfigError, match=message):
        folder_report(folder)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no run and no sweep.*mltfr inspect \S+"):
        folder_report(tmp_path)
    with pytest.raises(CheckpointError, match="there is no such folder"):
        folder_report(tmp_path / "none")


def test_what_lies_beside_a_run_or_a_sweep_names_it(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", finished=True)
    sweep = make_run(tmp_path / "sweeps" / "mine" / "trials" / "0001", finished=True).parents[1]
    for name in ("sweep.yaml", "base.yaml"):
        (sweep / name).write_text("name: mine\n")
    for within in (sweep / "trials", sweep / "sweep.yaml"):
        with pytest.raises(CheckpointError, match=rf"`mltfr report {sweep}`"):
            folder_report(within)
    with pytest.raises(CheckpointError, match=rf"`mltfr report {run}`"):
        folder_report(run / CONFIG)
    with pytest.raises(CheckpointError, match=rf"`mltfr report {run}`, {sweep}\."):
        folder_report(tmp_path)
