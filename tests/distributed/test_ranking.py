"""Ranks and metrics are the same to the bit for any number of ranks, ZeRO stage and batch."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import findings, tiny_config, write_periods

WORKER = Path(__file__).with_name("ranking_worker.py")


@pytest.mark.integration
def test_metrics_are_the_same_however_users_are_divided(tmp_path: Path) -> None:
    tiny_config(tmp_path)  # data and tables
    write_periods(tmp_path, "all", targets="all")
    result = {n: findings(WORKER, "ranked", tmp_path, n) for n in (1, 2)}
    for case in ("sasrec", "bert4rec", "several targets"):
        runs = [run for one in result.values() for k, run in one.items() if k.startswith(case)]
        assert len(runs) == 6
        *expected, loss = runs[0]
        assert len(set(expected[-120:])) > 10
        for *others, other_loss in runs[1:]:
            assert others == expected
            assert other_loss == pytest.approx(loss, rel=1e-6)
