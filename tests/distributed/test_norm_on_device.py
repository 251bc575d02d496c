"""ZeRO on GPUs: DeepSpeed's numbers, and nobody waits for the device or for another rank."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import findings, tiny_config

WORKER = Path(__file__).parent / "norm_worker.py"
POISONED = "backbone.item_embedding.weight"


@pytest.mark.parametrize("num_ranks", [1, pytest.param(2, marks=pytest.mark.integration)])
def test_a_norm_that_stays_on_the_device_clips_and_skips_alike(
    tmp_path: Path, num_ranks: int
) -> None:
    tiny_config(tmp_path)
    result = findings(WORKER, "compared", tmp_path, num_ranks)
    assert len(result) == 5
    for name, (plain, ours) in result.items():
        expected = [[2, POISONED], [4, "loss"], [6, "gradient norm"]]
        assert plain["verdicts"] == ours["verdicts"] == expected, name
        digits = 1e-4 if name == "bf16" else 1e-6  # there a last bit may round a parameter
        assert ours["losses"] == pytest.approx(plain["losses"], rel=digits), name
        assert len(set(ours["losses"])) == len(ours["losses"]), name
        assert ours["norms"] == pytest.approx(plain["norms"], rel=10 * digits), name
        assert plain["asked"][0] > 0, name
        assert ours["asked"] == [0], name


@pytest.mark.integration
def test_ranks_that_would_gather_unequally_often_are_refused(tmp_path: Path) -> None:
    tiny_config(tmp_path)
    said = findings(WORKER, "unlike", tmp_path, 2)
    assert said["2"] == ""
    assert "float64 at half its rate in fp32 is not the same on rank 1 (" in said["3"]
    assert "with a stage below 3" in said["3"]
