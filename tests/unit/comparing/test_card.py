"""`report.md` as a model card: what it must hold, and that its numbers are the run's."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import read_lines, tiny_config

from mltfr_dist.config import RunConfig
from mltfr_dist.training.comparing.compare import Options, compare_runs
from mltfr_dist.training.comparing.text import interval
from mltfr_dist.training.inputs import load_inputs
from mltfr_dist.training.reporting.curves import read_curves
from mltfr_dist.training.run_folder import Result
from mltfr_dist.training.running.fit import fit


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, list[Result], str]:
    config = tiny_config(
        tmp_path_factory.mktemp("run"),
        training__epochs=1,
        training__consensus_epochs=1,
        baselines=["item_knn", "backbone"],
    )
    results = fit(config)
    return config, results, (config.folder / "report.md").read_text()


def test_the_card_has_what_a_reader_needs(run: tuple[RunConfig, list[Result], str]) -> None:
    config, results, text = run
    inputs = load_inputs(config)
    for heading in ("Results with intervals", "Differences to", "Curves", "Fingerprint", "Machine"):
        assert f"## {heading}" in text
    assert all(digest in text for digest in inputs.hashes.values())
    assert "Protocol: split leave_one_out; candidates all 40 items; seen items left out" in text
    assert "leak check passed at preparation" in text
    assert "backbone:" in text.split("## Configuration")[1]
    assert (config.folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    shown = text.split("## Results with intervals")[1]
    for result in results:
        line = next(line for line in shown.splitlines() if line.startswith(f"| {result.name} |"))
        assert f"| {result.test['HR@10']:.4f} [" in line
        assert f"| {result.test['NDCG@10']:.4f} [" in line


def test_its_differences_are_those_that_compare_gives(
    run: tuple[RunConfig, list[Result], str],
) -> None:
    config, results, text = run
    others = [config.folder / "ranks-item_knn.parquet", config.folder / "backbone"]
    compared = compare_runs([config.folder, *others], "test", Options())
    for result, one in zip(results, compared.differences, strict=False):
        change = one.changes["NDCG@10"]
        by_results = result.test["NDCG@10"] - results[-1].test["NDCG@10"]
        assert change.difference == pytest.approx(by_results)
        assert f"| {result.name} | {change.difference:+.4f} | {interval(change)} |" in text


def test_curves_stand_at_the_updates_of_the_whole_run(
    run: tuple[RunConfig, list[Result], str],
) -> None:
    record: Path = run[0].folder / "metrics.jsonl"
    lines = [line for line in read_lines(record) if line["kind"] == "step"]
    first = [line["step"] for line in lines if line["stage"] == "train"]
    second = [line["step"] for line in lines if line["stage"] == "consensus"]
    losses, validations, begins = read_curves(record, "NDCG@10")
    assert [at for at, _ in losses] == [*first, *(step + max(first) for step in second)]
    assert begins == max(first)
    assert [value for _, value in losses] == [line["loss"] for line in lines]
    assert len(validations) == sum(line["kind"] == "valid" for line in read_lines(record))
