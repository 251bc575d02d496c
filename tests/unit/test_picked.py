"""A result's figures are those that picked its checkpoint, and `mltfr evaluate` repeats them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import read_lines, tiny_config

from mltfr_dist.distributed.checkpoint import read_header
from mltfr_dist.distributed.meeting import stop_ranks
from mltfr_dist.training.run_folder import CHECKPOINTS
from mltfr_dist.training.running.fit import fit
from mltfr_dist.training.using.inference import evaluate_run

NOISY = {
    "mltfr__filter__noise": 1.0,
    "published__noise_in_evaluation": True,
    "mltfr__filter__temperature": 0.5,
}
RUNS: dict[str, dict[str, Any]] = {
    "noisy": NOISY,
    "fading": NOISY | {"mltfr__filter__noise_steps": 100},
    "published": NOISY
    | {
        "published__straight_through": True,
        "mltfr__filter__top_k": 1,
        "published__pooled_memory": True,
        "published__whole_history_query": True,
        "published__random_consensus": True,
        "published__pick_on_test": True,
        "evaluation__select_by": "HR@5",
    },
    "stage 2 that only gets worse": NOISY
    | {"optimizer__learning_rate": 0.5, "mltfr__consensus__weight": 3.0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("picked")
    stop_ranks()


@pytest.mark.parametrize("name", RUNS)
def test_the_result_is_what_picked_and_is_repeated(folder: Path, name: str) -> None:
    start = {"training__epochs": 2, "training__consensus_epochs": 2}
    config = tiny_config(folder, **start | RUNS[name] | {"name": name.replace(" ", "-")})
    (result,) = fit(config)
    split = config.picks_on
    kind = "valid" if split == "valid" else "picked_on_test"
    (picked,) = [
        line
        for line in read_lines(config.folder / "metrics.jsonl")
        if (line["kind"], line["stage"], line.get("epoch")) == (kind, result.stage, result.epoch)
    ]
    progress = read_header(config.folder / CHECKPOINTS / result.checkpoint).progress
    assert progress.best_value == picked[config.evaluation.select_by]
    reported = result.valid if split == "valid" else result.test
    assert {metric: picked[metric] for metric in reported} == reported
    assert evaluate_run(config.folder, "valid") == result.valid
    assert evaluate_run(config.folder, "test") == result.test
