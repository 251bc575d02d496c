"""Where the item table's rows are held changes no number: losses, metrics and checkpoints are those
of whole ones.
"""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import REPOSITORY, findings, read_lines, relative_difference, run_ranks, tiny_config
from test_interrupted import kill_at

from mltfr_dist.backbones import BACKBONES
from mltfr_dist.config import RunConfig
from mltfr_dist.distributed import checkpoint, kept
from mltfr_dist.distributed.checkpoint import MODEL, OPTIMIZER, Progress
from mltfr_dist.distributed.divided_files import (
    MODEL_ROWS,
    OPTIMIZER_ROWS,
    file_name,
    read_run,
)
from mltfr_dist.distributed.item_placement import check_items_divide, items_text, resolve_items
from mltfr_dist.distributed.ranks import ALONE, Ranks
from mltfr_dist.distributed.row_layout import RowLayout
from mltfr_dist.distributed.tensor_file import write_tensors
from mltfr_dist.errors import ConfigError, DamagedError
from mltfr_dist.exported import load_exported
from mltfr_dist.losses import LOSSES
from mltfr_dist.models.divided_rows import divided_rows
from mltfr_dist.optimizers import OPTIMIZERS
from mltfr_dist.training.run_folder import dump_config, load_result
from mltfr_dist.training.using.export import export
from mltfr_dist.training.using.inference import evaluate_run, load_run

WORKER = Path(__file__).parent / "divided_worker.py"
THREE = Ranks(0, 3, torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("divided")
    tiny_config(place)
    return place


@pytest.mark.parametrize("num_rows", [3, 1023, 1024, 1025, 10_001, 123_457])
def test_every_row_has_one_place_and_popular_ones_are_spread(num_rows: int) -> None:
    layout, ids = RowLayout(num_rows, 3), torch.arange(num_rows)
    positions = layout.positions(ids)
    assert positions.sort().values.equal(ids)
    assert layout.row_ids(positions).equal(ids)
    assert layout.positions(torch.tensor(0)) == 0, "padding is recognised by its place"
    if num_rows > 10_000:
        popular = layout.positions(torch.arange(2048))
        counts = [((popular >= a) & (popular < b)).sum() for a, b in pairwise(layout.bounds)]
        assert max(counts) < 1.1 * 2048 / 3


@pytest.mark.parametrize(
    "num_ranks", [pytest.param(n, marks=[pytest.mark.slow] * (n != 3)) for n in (2, 3, 4)]
)
def test_full_cross_entropy_over_divided_items_is_the_whole_one(
    folder: Path, num_ranks: int
) -> None:
    result = findings(WORKER, "cross_entropy", folder, num_ranks)
    assert max(result["torch.float64"]) < 1e-12
    assert max(result["torch.float32"]) < 1e-6, "of the largest, against float64"


@pytest.mark.parametrize("num_ranks", [3, pytest.param(2, marks=pytest.mark.slow)])
def test_places_of_targets_are_those_among_whole_items(folder: Path, num_ranks: int) -> None:
    result = findings(WORKER, "positions", folder, num_ranks)
    better, equal, normaliser = result["differences"]
    assert better == equal == 0, "to the bit"
    assert normaliser < 1e-5
    assert result["ties"][0] > 0, "equal scores were not put to the test"


@pytest.mark.parametrize(
    "num_ranks", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))]
)
def test_losses_and_norms_are_those_of_a_replicated_table(folder: Path, num_ranks: int) -> None:
    compare_placements(findings(WORKER, "losses", folder, num_ranks), 4)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_every_kind_of_loss_backbone_and_optimizer_trains_alike(
    folder: Path, num_ranks: int
) -> None:
    compare_placements(findings(WORKER, "further", folder, num_ranks), 8)


@pytest.mark.slow
def test_every_backbone_trains_alike(folder: Path) -> None:
    compare_placements(findings(WORKER, "backbones", folder, 2), len(BACKBONES))


def compare_placements(result: dict[str, list[float]], num_variants: int) -> None:
    names = [name.removesuffix(" rows") for name in result if name.endswith(" rows")]
    assert len(names) == num_variants
    for name in names:
        whole = result[f"{name} replicated"]
        assert whole[-2] != whole[0], "nothing was trained, so equality would say nothing"
        tolerance = 0.02 if name.startswith("bf16") else 1e-6
        assert relative_difference(whole, result[f"{name} rows"]) < tolerance, name


@pytest.fixture(scope="module")
def saved(folder: Path) -> dict[str, list[float]]:
    return findings(WORKER, "saved", folder, 2)


def test_checkpoints_go_on_exactly_with_either_placement(saved: dict[str, list[float]]) -> None:
    for name in ("sparse", "cross-entropy"):
        expected = saved[f"{name} replicated goes on"]
        assert relative_difference(expected, saved[f"{name} rows goes on"]) < 1e-6
        assert saved[f"{name} rows rows"] == saved[f"{name} rows goes on"], "to the bit"
    resumed_alike(saved, saved)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_checkpoints_go_on_at_other_world_sizes(
    folder: Path, saved: dict[str, list[float]], num_ranks: int
) -> None:
    resumed_alike(saved, findings(WORKER, "elsewhere", folder, num_ranks))


def resumed_alike(saved: dict[str, list[float]], resumed: dict[str, list[float]]) -> None:
    for name in ("sparse", "cross-entropy"):
        expected = saved[f"{name} replicated goes on"]
        for how in ("rows rows", "rows replicated", "replicated rows"):
            assert relative_difference(expected, resumed[f"{name} {how}"]) < 1e-6, how


def run_config(folder: Path, placement: str) -> RunConfig:
    return tiny_config(
        folder,
        name=f"run-{placement}",
        backbone__dropout=0.0,
        mltfr__expert__dropout=0.0,
        item_table__placement=placement,
        training__global_batch_size=30,
        training__epochs=2,
        training__consensus_epochs=1,
        checkpoint__every_steps=2,
    )


def run(config: RunConfig, folder: Path, num_ranks: int) -> str:
    path = folder / f"{config.name}.yaml"
    path.write_text(dump_config(config))
    return run_ranks(num_ranks, REPOSITORY / "train.py", "--config", str(path))


def same_numbers(first: RunConfig, second: RunConfig) -> None:
    """Losses to rounding, and metrics to that of a sum over users: their ranks are the same."""
    one, two = (read_lines(config.folder / "metrics.jsonl") for config in (first, second))
    assert len(one) == len(two) > 10
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"seconds"}:
            close = {"rel": 1e-12} if "@" in key else {"rel": 1e-4, "abs": 1e-6}
            is_number = isinstance(a[key], float)
            assert b[key] == (pytest.approx(a[key], **close) if is_number else a[key]), key
    results = [load_result(config.folder) for config in (first, second)]
    assert results[0] is not None
    assert results[1] is not None
    assert results[1].test == pytest.approx(results[0].test, rel=1e-12)
    assert results[0].parameters == results[1].parameters


@pytest.mark.integration
def test_a_whole_run_over_rows_is_that_of_replicated_rows(folder: Path) -> None:
    """Both stages, validation, Fisher, the projector; then its numbers again on one process."""
    configs = [run_config(folder, placement) for placement in ("auto", "replicated")]
    printed = [run(config, folder, 2) for config in configs]
    assert ["items   rows: each rank holds 1/2 of the rows" in text for text in printed] == [
        True,
        False,
    ]
    same_numbers(*configs)
    result = load_result(configs[0].folder)
    assert result is not None
    assert evaluate_run(configs[0].folder, "test") == pytest.approx(result.test)
    export(configs[0].folder, folder / "exported")
    exported, held = load_exported(folder / "exported"), load_run(configs[0].folder)
    assert divided_rows(held.model) is None
    assert exported.scores([["i1", "i7"]]).equal(held.scores([["i1", "i7"]]))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_run_goes_on_at_other_world_sizes(tmp_path: Path) -> None:
    whole, killed = run_config(tmp_path, "replicated"), run_config(tmp_path, "rows")
    run(whole, tmp_path, 2)
    lines = len(read_lines(whole.folder / "metrics.jsonl"))
    place = tmp_path / "killed.yaml"
    kill_at(killed, place, random.Random().randint(3, lines // 2))
    run(killed, tmp_path, 3)
    same_numbers(whole, killed)


def test_what_cannot_be_divided_is_refused(folder: Path) -> None:
    config = tiny_config(folder, item_table__placement="rows")
    with pytest.raises(ConfigError, match=r"2 items.*rows divides them over 3 ranks.*replicated"):
        check_items_divide(config, 2, THREE)
    check_items_divide(config, 3, THREE)
    check_items_divide(tiny_config(folder, item_table__placement="replicated"), 2, THREE)


def test_one_rank_holds_every_row(folder: Path) -> None:
    for placement, at_three in (("rows", "rows"), ("auto", "rows"), ("replicated", "replicated")):
        config = tiny_config(folder, item_table__placement=placement)
        assert resolve_items(config, THREE) == at_three
        assert resolve_items(config, ALONE) == "replicated"
    assert items_text(config, ALONE) == "replicated: each rank holds every row"


@pytest.mark.parametrize("damage", ["missing", "cut off", "of another run"])
def test_a_damaged_share_is_passed_over_by_name(tmp_path: Path, damage: str) -> None:
    folder, said = tmp_path / "checkpoints", []
    for step in (1, 2):
        write_checkpoint(folder / f"train-step{step:09d}", step)
    file = folder / "train-step000000002" / file_name(OPTIMIZER_ROWS, 1, 2)
    if damage == "missing":
        file.unlink()
    elif damage == "cut off":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        write_tensors(file, {"table/exp_avg": torch.ones(5, 2)}, lambda: None)
    result = kept.latest_intact(folder, "train", said.append)
    assert result == folder / "train-step000000001"
    (warning,) = said
    assert "train-step000000002" in warning
    assert file.name in warning


def write_checkpoint(folder: Path, step: int) -> None:
    """What two ranks would write of a table of 9 rows."""
    partial, hashes = checkpoint.begin(folder), {}
    for rank, count in enumerate((4, 5)):
        for kind, name in ((MODEL_ROWS, "table"), (OPTIMIZER_ROWS, "table/exp_avg")):
            file = file_name(kind, rank, 2)
            rows = torch.full((count, 2), float(step)) + torch.arange(count)[:, None] + 4 * rank
            hashes[file] = write_tensors(partial / file, {name: rows}, lambda: None)
    tensors: dict[str, Any] = {MODEL: {"other": torch.ones(3)}, OPTIMIZER: {}}
    for file, state in tensors.items():
        hashes[file] = write_tensors(partial / file, state, lambda: None)
    checkpoint.finish(folder, Progress(stage="train", step=step), hashes)


def test_shares_are_put_together_and_read_in_runs(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "saved", 1)
    state = checkpoint.read(tmp_path / "saved")
    assert state["table"][:, 0].tolist() == [1.0 + row for row in range(9)]
    assert set(checkpoint.read(tmp_path / "saved", with_rows=False)) == {"other"}
    assert load_file(tmp_path / "saved" / file_name(MODEL_ROWS, 1, 2))["table"].shape == (5, 2)
    files = [file_name(MODEL_ROWS, rank, 2) for rank in range(2)]
    run = torch.empty(3, 2)
    read_run(tmp_path / "saved", files, "table", RowLayout(9, 3), 3, run)
    assert run[:, 1].tolist() == [4.0, 5.0, 6.0]
    (tmp_path / "saved" / files[1]).unlink()
    with pytest.raises(DamagedError, match=files[1]):
        read_run(tmp_path / "saved", files, "table", RowLayout(9, 3), 3, run)


def test_rows_are_refused_where_a_rank_needs_whole_items(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As optimizers and losses of a user's own may."""
    lamb = OPTIMIZERS["adamw"]._replace(elementwise=False)
    hinge = LOSSES["cross_entropy"]._replace(path="losses:hinge")
    monkeypatch.setitem(OPTIMIZERS, "lamb", lamb)
    monkeypatch.setitem(LOSSES, "hinge", hinge)
    for changes, reason in (
        ({"optimizer__name": "lamb"}, "optimizer.name lamb looks at the shape of the whole table"),
        ({"loss__name": "hinge"}, "loss.name hinge reads all item vectors"),
    ):
        with pytest.raises(ConfigError, match=f"{reason}: give item_table.placement auto"):
            tiny_config(folder, item_table__placement="rows", **changes)
        config = tiny_config(folder, item_table__placement="auto", **changes)
        assert resolve_items(config, THREE) == "replicated"
        assert items_text(config, THREE).endswith(f"because {reason}")
