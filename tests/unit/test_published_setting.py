"""The plan of the authors' setting: which runs, and what they differ in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import published_setting
from mltfr_dist.tables.store import load_table
from tests.support import write_table


@pytest.fixture
def options(tmp_path: Path) -> list[str]:
    for name, width in (("llama2", 4), ("smollm2", 12), ("minilm", 6)):
        write_table(tmp_path / "tables", name, num_rows=20, dim=width, seed=width)
    places = {"--tables": "tables", "--runs": "runs", "--data": "lastfm"}
    return [word for key, name in places.items() for word in (key, str(tmp_path / name))]


def plan(options: list[str]) -> list[published_setting.Task]:
    return list(published_setting.plan(published_setting.build_parser().parse_args(options)))


def test_arms_differ_in_what_they_say(options: list[str]) -> None:
    tasks = {task.config.name: task for task in plan([*options, "--backbones", "sasrec_original"])}
    assert len(tasks) == 6
    for arm in published_setting.ARMS:
        theirs = tasks[f"lastfm-sasrec_original-{arm}-0"].config
        twin = tasks[f"lastfm-sasrec_original-{arm}_by_validation-0"].config
        assert (theirs.picks_on, twin.picks_on) == ("test", "valid")
        assert theirs.published.train_on_validation
        assert not twin.published.train_on_validation
        fixed = {"pick_on_test": False, "train_on_validation": False}
        same = theirs.published.model_copy(update=fixed)
        assert theirs.model_copy(update={"name": twin.name, "published": same}) == twin
    real, random = (
        tasks[f"lastfm-sasrec_original-{arm}-0"].config for arm in ("paper", "paper_random_tables")
    )
    content = real.mltfr.model_copy(update={"table_content": "random"})
    assert real.model_copy(update={"name": random.name, "mltfr": content}) == random
    assert real.mltfr.consensus.group == ("minilm", "smollm2_narrow")
    bare = tasks["lastfm-sasrec_original-bare-0"].config
    assert not bare.mltfr.enabled
    assert bare.training.epochs == real.training.epochs + real.training.consensus_epochs


def test_the_second_backbone_has_its_own_defects(options: list[str]) -> None:
    config = next(task.config for task in plan(options) if "bsarec-paper-" in task.config.name)
    assert config.published.whole_sequence_filter
    assert config.published.double_softmax


def test_the_narrow_table_is_the_projection_that_keeps_most(
    options: list[str], tmp_path: Path
) -> None:
    plan(options)
    wide = load_table(tmp_path / "tables" / "smollm2").rows.double()
    narrow = load_table(tmp_path / "runs" / "tables" / "smollm2_narrow").rows.double()
    assert narrow.shape == (20, 6)
    assert narrow.square().mean().item() == pytest.approx(1, rel=1e-5)
    largest = torch.linalg.svdvals(wide - wide.mean(0))[:6]
    shares = torch.linalg.svdvals(narrow)
    torch.testing.assert_close(shares / shares[0], largest / largest[0], rtol=1e-4, atol=1e-5)


def test_the_report_reads_both_choices_off_one_curve(options: list[str]) -> None:
    def write(name: str, kind: str, values: list[float], own: float) -> None:
        folder = tasks[f"lastfm-sasrec_original-{name}-0"].folder
        folder.mkdir(parents=True)
        lines = [
            {"kind": kind, **dict.fromkeys(published_setting.METRICS, value)} for value in values
        ]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        measured = {"test": dict.fromkeys(published_setting.METRICS, own)}
        (folder / "result.json").write_text(json.dumps(measured))

    planned = plan([*options, "--backbones", "sasrec_original"])
    tasks = {task.config.name: task.config for task in planned}
    write("bare", "picked_on_test", [0.1, 0.4, 0.2, 0.3], 0.4)
    assert len(list(published_setting.report(planned))) == 2  # the head alone
    write("bare_by_validation", "valid", [0.5, 0.6, 0.7, 0.7], 0.25)
    *_, line = published_setting.report(planned)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:2] == ["lastfm-sasrec_original-0", "bare"]
    assert [cell.split(" / ")[0] for cell in cells[2:]] == ["0.4000", "0.2000", "0.3000", "0.2500"]
    assert [cell[-3:] for cell in cells[2:5]] == ["(2)", "(3)", "(4)"]
