"""Every field of a run's configuration has an effect: a run with it changed leaves another
trace.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from changes import CHANGES, WITH
from support import read_lines, tiny_config

from mltfr_dist.config import RunConfig
from mltfr_dist.distributed.meeting import stop_ranks
from mltfr_dist.schema import Section, field_paths
from mltfr_dist.training.running.fit import fit

ELSEWHERE = {
    "name": "names the folder: test_run_folder",
    "runs_dir": "names the folder: test_run_folder",
    "data.path": "every test that trains",
    "data.on_bad_shard": "needs a bad shard: test_damage",
    "data.read_attempts": "needs a failing disk: test_damage",
    "data.read_timeout": "needs a slow disk: test_damage",
    "data.num_workers": "must not change the batches: test_stream",
    "mltfr.tables": "every test that trains",
    "mltfr.placement": "must not change the numbers: tests/distributed/test_placement.py",
    "item_table.placement": "must not change the numbers: tests/distributed/test_divided_items.py",
    "mltfr.filter.max_direct_rows": "larger memories are refused: models/test_strategies",
    "training.micro_batch_size": "must *not* change the numbers: tests/distributed/test_zero.py",
    "tracking.also": "needs another package: test_board",
    "tracking.projector_items": "must not change the numbers: test_board",
    "checkpoint.background": "must not change the files: distributed/test_background",
    "training.max_skipped_steps": "needs numbers that are not finite: distributed/test_health",
    "training.hang_seconds": "needs a hang: distributed/test_health",
    "training.threads": "must not change the numbers: test_threads below",
    "evaluation.select_by": "picks: test_picked",
    "evaluation.batch_size": "must not change the numbers: test_evaluate",
    "evaluation.ties": "needs equal scores: test_evaluate, test_metrics",
}
"""Fields whose effect another test shows."""


def leaves() -> set[str]:
    paths = field_paths(RunConfig)
    return {p for p in paths if not any(other.startswith(p + ".") for other in paths)}


def test_every_field_is_tried() -> None:
    assert issubclass(RunConfig, Section)
    assert set(CHANGES) | set(ELSEWHERE) == leaves()
    assert not set(CHANGES) & set(ELSEWHERE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("effects")
    yield place
    stop_ranks()


def trace(folder: Path, name: str, changes: dict[str, Any]) -> tuple[list[Any], list[str], str]:
    """What a run leaves: its metrics, its files, its report's rows."""
    dotted = {key.replace(".", "__"): value for key, value in changes.items()}
    start = {"training__epochs": 2, "training__consensus_epochs": 1, "name": name}
    config = tiny_config(folder, **(start | dotted))
    if not config.folder.exists():
        fit(config)
    files = sorted(
        str(p.relative_to(config.folder)) for p in (config.folder / "checkpoints").rglob("*")
    )
    rows = [
        line
        for line in (config.folder / "report.md").read_text().splitlines()
        if line.startswith("| ") and " s |" in line
    ]
    return (
        read_lines(config.folder / "metrics.jsonl"),
        files,
        str([row.split("|")[1] for row in rows]),
    )


@pytest.mark.parametrize("field", CHANGES)
def test_field_has_an_effect(folder: Path, field: str) -> None:
    needed = WITH.get(field, {})
    base_name = "base" + "".join(f"-{k}-{v}" for k, v in needed.items()).translate(
        str.maketrans(".[]' ,", "------")
    )
    assert trace(folder, base_name, needed) != trace(
        folder, field.replace(".", "-"), needed | {field: CHANGES[field]}
    )


@pytest.mark.integration
@pytest.mark.parametrize("name", ["fmlp", "bsarec", "linrec"])
def test_the_padded_form_has_an_effect(folder: Path, name: str) -> None:
    base = {"backbone.name": name, "data.samples": "prefixes", "mltfr.enabled": False}
    padded = base | {"backbone.name": f"{name}_original"}
    assert trace(folder, f"prefixes-{name}", base) != trace(folder, f"padded-{name}", padded)


def test_the_same_run_leaves_the_same_trace(folder: Path) -> None:
    assert trace(folder, "base", {}) == trace(folder, "again", {})


def test_threads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from mltfr_dist.distributed.meeting import start_ranks

    before = torch.get_num_threads()
    start_ranks(2)
    assert torch.get_num_threads() == 2
    start_ranks(1)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)
