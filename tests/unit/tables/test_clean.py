"""Normalisation in passes over a file: the arithmetic, and that its blocks change nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_store import random_rows

from mltfr_dist.tables.clean import EIGENVALUE_FLOOR, MeanCosine, normalise_rows
from mltfr_dist.tables.row_file import RowFile


def normalised(folder: Path, rows: torch.Tensor, how: str) -> torch.Tensor:
    """``rows`` written to a file and normalised there; the mean cosines are those of the rows."""
    with RowFile(folder / f"{how}.safetensors", *rows.shape) as file:
        file.write(0, rows)
        before, after = normalise_rows(file, how)  # type: ignore[arg-type]
        result = torch.cat([block for _, block in file.blocks(1000)])
    (folder / f"{how}.safetensors").unlink()
    assert before == pytest.approx(mean_cosine(rows), abs=1e-12)
    assert after == pytest.approx(mean_cosine(result), abs=1e-9)
    return result


def mean_cosine(rows: torch.Tensor) -> float:
    cosine = MeanCosine(rows.shape[1])
    cosine.add(rows)
    return cosine.value


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_mean_cosine_equals_all_pairs(offset: float) -> None:
    rows = random_rows(5000, 6, offset=offset)[:700]
    unit = torch.nn.functional.normalize(rows.double())
    pairs = unit @ unit.T
    expected = (pairs.sum() - pairs.trace()) / (700 * 699)
    assert mean_cosine(rows) == pytest.approx(float(expected), abs=1e-12)


def test_mean_cosine_leaves_out_rows_without_direction() -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    assert mean_cosine(rows) == pytest.approx(2**-0.5)
    assert mean_cosine(rows[:2]) == 0.0


def test_scale_centres_and_gives_unit_variance_keeping_proportions(tmp_path: Path) -> None:
    before = random_rows(9000)
    rows = normalised(tmp_path, before, "scale")
    torch.testing.assert_close(rows.mean(0), torch.zeros(8), atol=1e-5, rtol=0)
    assert float(rows.square().mean()) == pytest.approx(1, abs=1e-5)
    ratio = rows / (before - before.mean(0))
    torch.testing.assert_close(ratio, ratio.median().expand_as(ratio), rtol=1e-2, atol=1e-2)


def test_scale_gives_to_the_bit_what_it_gave_in_memory(tmp_path: Path) -> None:
    """The arithmetic of the first release, on which the hashes of stored tables rest."""
    before = random_rows(9000, 100)  # four blocks
    rows = before.clone()
    blocks = torch.split(rows, (1 << 18) // 100)
    mean = sum((b.double().sum(0) for b in blocks), torch.zeros(100).double()) / len(rows)
    mean_square = 0.0
    for block in blocks:
        block.copy_(block.double() - mean)
    for block in blocks:
        mean_square += float(block.double().square().sum()) / rows.numel()
    rows.div_(mean_square**0.5)
    assert torch.equal(normalised(tmp_path, before, "scale"), rows)


def test_whiten_gives_identity_covariance_and_is_symmetric(tmp_path: Path) -> None:
    before = random_rows(9000)
    rows = normalised(tmp_path, before, "whiten")
    torch.testing.assert_close(rows.mean(0), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(rows.T @ rows / len(rows), torch.eye(8), atol=1e-4, rtol=0)
    transform = torch.linalg.lstsq((before - before.mean(0)).double(), rows.double()).solution
    torch.testing.assert_close(
        transform, transform.T, atol=1e-4, rtol=1e-4
    )  # ZCA, not another whitening


def test_whiten_is_accurate_where_directions_differ_a_thousandfold(tmp_path: Path) -> None:
    """Against ZCA in float64 as one product: eigenvalues down to the floor, several blocks."""
    basis = torch.linalg.qr(random_rows(300, 300, offset=0.0).double()).Q
    scale = torch.logspace(0, -2.9, 300, dtype=torch.float64)
    rows = ((torch.randn(15_000, 300, dtype=torch.float64) * scale) @ basis + 0.5).float()
    result = normalised(tmp_path, rows, "whiten").double()
    centred = rows.double() - rows.double().mean(0)
    values, axes = torch.linalg.eigh(centred.T @ centred / len(rows))
    values = values.clamp(min=EIGENVALUE_FLOOR * float(values[-1]))
    expected = centred @ (axes * values.rsqrt()) @ axes.T
    torch.testing.assert_close(result, expected, atol=2e-3, rtol=0)
    covariance = result.T @ result / len(rows)
    torch.testing.assert_close(covariance, torch.eye(300).double(), atol=1e-3, rtol=0)


def test_whiten_does_not_blow_up_a_missing_direction(tmp_path: Path) -> None:
    rows = torch.cat([random_rows(500, 4), torch.zeros(500, 1)], dim=1)
    rows = normalised(tmp_path, rows, "whiten")
    assert float(rows[:, 4].abs().max()) < 1e-3
    assert bool(torch.isfinite(rows).all())


def test_none_keeps_values(tmp_path: Path) -> None:
    assert torch.equal(normalised(tmp_path, random_rows(), "none"), random_rows())
