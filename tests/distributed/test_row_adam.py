"""An item table that is stepped by rows: the numbers of torch's SparseAdam, at any stage, world
size and division.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support import findings, relative_difference, tiny_config

WORKER = Path(__file__).parent / "rows_worker.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("rows")
    tiny_config(place)
    return place


def test_gradients_are_the_dense_ones_and_what_is_exchanged_does_not_grow_with_the_table(
    folder: Path,
) -> None:
    for num_ranks in (1, 2):
        result = findings(WORKER, "gradients", folder, num_ranks)
        small, large = result.pop("1000 rows"), result.pop("1000000 rows")
        assert small == large
        assert len(small) == 2
        assert all((size > 0) == (num_ranks > 1) for size in small)
        assert len(result) == 3
        for name, (difference, largest, norm, dense_norm, scale) in result.items():
            assert difference < 1e-5 * largest, name
            assert norm == pytest.approx(dense_norm, rel=1e-5), name
            assert scale == pytest.approx(0.5 / dense_norm, rel=1e-5), (
                "clipped by the norm of all gradients"
            )


@pytest.mark.integration
@pytest.mark.timeout(600)
def test_losses_are_those_of_sparse_adam_however_the_work_is_divided(folder: Path) -> None:
    one, two = findings(WORKER, "losses", folder, 1), findings(WORKER, "losses", folder, 2)
    for name in ("zero1", "bce", "unclipped"):
        assert relative_difference(one[f"{name} reference"], one[name]) < 1e-5, name
    base = one["zero1"]
    assert base[-1] < 0.9 * base[0], "nothing was learned, so equality would say nothing"
    for name, losses in two.items():
        if "bf16" in name:
            assert 1e-7 < relative_difference(base, losses) < 0.05, name
        else:
            assert relative_difference(one[name], losses) < 1e-5, name
        if name.split()[0].startswith("zero") or name.startswith("accumulated"):
            assert relative_difference(base, losses) < 1e-5, name
    for name in ("dense", "unclipped", "bce"):
        assert relative_difference(base, one[name]) > 1e-4, f"{name} is no variant of its own"


@pytest.mark.integration
def test_checkpoints_continue_exactly_and_at_other_world_sizes(folder: Path) -> None:
    saved = findings(WORKER, "saved", folder, 2)
    names = [name.removesuffix(" resumed") for name in saved if name.endswith(" resumed")]
    assert len(names) == 4
    for name in names:
        assert saved[f"{name} resumed"] == saved[f"{name} uninterrupted"], name
    for num_ranks in (1, 4):
        result = findings(WORKER, "elsewhere", folder, num_ranks)
        for name in names:
            tolerance = 1e-3 if name == "bf16" else 1e-5
            assert (
                relative_difference(saved[f"{name} uninterrupted"], result[f"{name} resumed"])
                < tolerance
            ), name
