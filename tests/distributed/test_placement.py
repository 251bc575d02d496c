"""Where a table's rows are held changes no number: the same rows are found, ties included, with the
same gradients.
"""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from support import REPOSITORY, findings, read_lines, run_ranks, tiny_config, write_table

from mltfr_dist.config import RunConfig
from mltfr_dist.distributed.placement import (
    check_placement,
    place_tables,
    placement_text,
    resolve_placement,
)
from mltfr_dist.distributed.ranks import ALONE, Ranks
from mltfr_dist.distributed.table_shards import row_bounds
from mltfr_dist.errors import ConfigError
from mltfr_dist.schema import changed
from mltfr_dist.tables.store import load_table, read_rows
from mltfr_dist.training.inputs import load_inputs
from mltfr_dist.training.run_folder import dump_config, load_result
from mltfr_dist.training.using.inference import evaluate_run

WORKER = Path(__file__).parent / "worker.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and two tables: 90 rows of which each comes 7 times, and 70 different ones; 4 ranks
    divide neither.
    """
    place = tmp_path_factory.mktemp("placement")
    tiny_config(place)
    shutil.rmtree(place / "tables" / "first")
    write_table(place / "tables", "first", num_rows=90, dim=12, seed=1, num_distinct=13)
    return place


@pytest.mark.parametrize(
    "num_ranks",
    [
        pytest.param(1, marks=pytest.mark.integration),
        2,
        3,
        pytest.param(4, marks=pytest.mark.integration),
    ],
)
def test_losses_gradients_and_kept_rows_are_those_of_replicated_tables(
    folder: Path, num_ranks: int
) -> None:
    result = findings(WORKER, "placements", folder, num_ranks)
    for search in ("shortlist", "exact", "noise", "random", "paper form"):
        expected = result[f"{search} replicated"]
        assert len(expected) > 1000
        largest = max(map(abs, expected))
        for placement in ("rows", "mmap"):
            given = result[f"{search} {placement}"]
            assert len(given) == len(expected)
            worst = max(abs(a - b) for a, b in zip(expected, given))
            assert worst <= 1e-6 * largest, f"{search} {placement} on {num_ranks} ranks: {worst}"
            assert given[-16:] == expected[-16:], f"{search} {placement}: kept rows"


@pytest.mark.integration
def test_training_is_the_same_wherever_tables_are(folder: Path) -> None:
    one, two = (
        findings(WORKER, "placed_training", folder, 1),
        findings(WORKER, "placed_training", folder, 2),
    )
    for result in (one, two):
        for name in ("rows", "rows zero3", "zero3", "mmap"):
            assert result[name] == pytest.approx(one["replicated"], rel=1e-6), name
        for name in ("rows bf16", "mmap bf16"):
            assert result[name] == pytest.approx(result["replicated bf16"], rel=1e-6), name


@pytest.mark.integration
def test_a_whole_run_over_rows_is_that_over_replicated_tables(folder: Path) -> None:
    """Both stages, validation, Fisher, explanation; then its numbers again on one process."""
    results = {}
    for placement in ("auto", "replicated"):
        config = tiny_config(
            folder, name=placement, mltfr__placement=placement, mltfr__filter__shortlist_size=40
        )
        path = folder / f"{placement}.yaml"
        path.write_text(dump_config(config))
        printed = run_ranks(
            3, REPOSITORY / "train.py", "--config", str(path), "training.global_batch_size=33"
        )
        assert ("each rank holds 1/3 of the rows" in printed) == (placement == "auto")
        results[placement] = config
    first, second = (
        read_lines(results[p].folder / "metrics.jsonl") for p in ("auto", "replicated")
    )
    assert [{k: v for k, v in line.items() if k != "seconds"} for line in first] == [
        {k: v for k, v in line.items() if k != "seconds"} for line in second
    ]
    result = load_result(results["auto"].folder)
    assert result is not None
    assert evaluate_run(results["auto"].folder, "test") == pytest.approx(result.test)


@pytest.mark.parametrize(("num_rows", "world_size"), [(90, 4), (7, 3), (5, 5), (1000, 64)])
def test_shares_cover_the_table_and_differ_by_a_row_at_most(num_rows: int, world_size: int) -> None:
    bounds = row_bounds(num_rows, world_size)
    sizes = [b - a for a, b in pairwise(bounds)]
    assert bounds[0] == 0
    assert sum(sizes) == bounds[-1] == num_rows
    assert max(sizes) - min(sizes) <= 1


def test_a_rank_reads_its_rows_alone(folder: Path) -> None:
    table = load_table(folder / "tables" / "second")
    assert read_rows(table, 23, 46).equal(table.rows[23:46])
    assert read_rows(table, 23, 46).untyped_storage().nbytes() == 23 * 20 * 4


def test_a_replicated_table_is_a_copy_and_a_mapped_one_is_none(folder: Path) -> None:
    config = tiny_config(folder)
    tables = load_inputs(config).tables
    for placement, copied in (("replicated", True), ("mmap", False)):
        placed = place_tables(
            changed(config, {"mltfr.placement": placement}, source="a test"), tables, ALONE
        )
        assert all(
            (p.whole().data_ptr() != t.rows.data_ptr()) == copied
            for p, t in zip(placed, tables, strict=True)
        )


NEEDS_WHOLE = {
    "trained_tables": {"published__trained_tables": True},
    "table_content": {"mltfr__table_content": "random"},
    "strategy": {"mltfr__filter__strategy": "learned_prototypes"},
    "straight_through": {
        "published__straight_through": True,
        "mltfr__filter__shortlist_size": None,
    },
}


@pytest.mark.parametrize("name", NEEDS_WHOLE)
def test_rows_are_refused_where_a_whole_table_is_needed_and_auto_says_so(
    folder: Path, name: str
) -> None:
    with pytest.raises(ConfigError, match=rf"placement rows divides tables, but \S*{name}"):
        tiny_config(folder, mltfr__placement="rows", **NEEDS_WHOLE[name])
    config = tiny_config(folder, **NEEDS_WHOLE[name])
    ranks = Ranks(1, 4, ALONE.device)
    assert resolve_placement(config, ranks) == "replicated"
    assert name in placement_text(config, ranks)


def test_auto_is_rows_above_one_rank(folder: Path) -> None:
    config: RunConfig = tiny_config(folder)
    assert resolve_placement(config, ALONE) == "replicated"
    assert resolve_placement(config, Ranks(0, 2, ALONE.device)) == "rows"


def test_placements_that_cannot_be(folder: Path) -> None:
    tables = load_inputs(tiny_config(folder)).tables
    zero3, rows = (tiny_config(folder, mltfr__placement=p) for p in ("zero3", "rows"))
    with pytest.raises(ConfigError, match=r"placement=zero3 at ZeRO stage 1\. .*zero3\.json"):
        check_placement(zero3, tables, ALONE, 1)
    with pytest.raises(ConfigError, match=r"`second` has 70 rows.*over 71"):
        check_placement(rows, tables[1:], Ranks(0, 71, ALONE.device), 1)
    check_placement(zero3, tables, ALONE, 3)
    check_placement(rows, tables, Ranks(0, 70, ALONE.device), 1)
    for placement in ("mmap", "zero3"):
        with pytest.raises(ConfigError, match="holds frozen tables"):
            tiny_config(folder, mltfr__placement=placement, published__trained_tables=True)
