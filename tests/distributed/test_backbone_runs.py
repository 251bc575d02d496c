"""Whole runs of backbones that read or score otherwise than SASRec: both stages, ranking, an
explanation.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support import REPOSITORY, read_lines, run_ranks, tiny_config

from mltfr_dist.cli import main as mltfr
from mltfr_dist.training.run_folder import dump_config

RUNS = {
    "bert4rec": {"backbone__bert4rec__mask_ratio": 0.5},
    "cl4srec": {
        "backbone__cl4srec__contrast_group": 8,
        "loss__name": "sampled_softmax",
        "loss__num_negatives": 16,
    },
}


@pytest.mark.integration
@pytest.mark.parametrize("name", RUNS)
def test_a_run_trains_both_stages_and_recommends(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(
        tmp_path,
        backbone__name=name,
        training__epochs=10,
        training__patience=10,
        training__consensus_epochs=1,
        optimizer__learning_rate=0.01,
        **RUNS[name],
    )
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    run_ranks(2, REPOSITORY / "train.py", "--config", str(path))
    lines = [line for line in read_lines(config.folder / "metrics.jsonl") if line["kind"] == "step"]
    losses = [line["loss"] for line in lines]
    assert sum(losses[-4:]) < 0.99 * sum(losses[:4])  # few steps: a cloze model learns slowly
    assert all(
        line["balance_loss"] == pytest.approx(1, abs=0.2) for line in lines
    )  # per real position, not per target
    assert all(("contrast_loss" in line) == (name == "cl4srec") for line in lines)
    assert (
        mltfr(
            [
                "recommend",
                str(config.folder),
                "--history",
                ",".join(f"i{n}" for n in range(1, 13)),
                "--k",
                "3",
                "--explain",
            ]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "What the token filter keeps" in shown
