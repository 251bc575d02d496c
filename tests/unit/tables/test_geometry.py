"""`mltfr tables --inspect`: what is said of a geometry is what it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support import write_table
from torch.nn import functional as F

from mltfr_dist.cli import main
from mltfr_dist.config import TableConfig
from mltfr_dist.tables.geometry import (
    nearest,
    neighbour_words,
    overlap,
    sampled,
    shared_words,
    spread,
)
from mltfr_dist.tables.store import TokenTable, load_table, save_table

WORDS = ["".join((a, b, "x")) for a in "abcdefgh" for b in "abcdefgh"]
DIM = 12


def stored(folder: Path, name: str, rows: torch.Tensor, words: list[str] = WORDS) -> TokenTable:
    save_table(
        folder,
        rows,
        [f" {word}" for word in words],
        name=name,
        source_files=("made",),
        source_sha256="0" * 64,
        tensor="made",
        source_dtype="F32",
        source_rows=len(rows),
        vocabulary_file="made",
        licence=None,
        dropped={},
        mean_cosine_before=0.5,
        mean_cosine_after=0.0,
        config=TableConfig(),
    )
    return load_table(folder / name)


def rows_of(seed: int, num_rows: int = len(WORDS)) -> torch.Tensor:
    return torch.randn(num_rows, DIM, generator=torch.Generator().manual_seed(seed))


def test_nearest_rows_are_those_of_all_pairs_in_any_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, places = rows_of(0), [3, 17, 63]
    unit = F.normalize(rows, dim=1)
    scores = unit[places] @ unit.T
    scores[torch.arange(3), places] = -torch.inf
    expected = scores.topk(4, dim=1)
    for entries in (1, 7 * DIM, 1 << 20):
        monkeypatch.setattr("mltfr_dist.tables.geometry.BLOCK_ENTRIES", entries)
        cosines, numbers = nearest(rows, places, 4)
        assert torch.equal(numbers, expected.indices)
        torch.testing.assert_close(cosines, expected.values)


def test_a_table_agrees_with_itself_turned_and_not_with_another(tmp_path: Path) -> None:
    rows = rows_of(1)
    turned = rows @ torch.linalg.qr(rows_of(2, DIM))[0]  # the same geometry, other axes
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(3)).tolist()
    one = stored(tmp_path, "one", rows)
    same = stored(tmp_path, "same", turned[order], [WORDS[i] for i in order])
    other = stored(tmp_path, "other", rows_of(4))
    assert overlap(one, same).share == pytest.approx(1.0)
    unrelated = overlap(one, other)
    assert unrelated.by_chance == pytest.approx(10 / 63)
    assert abs(unrelated.share - unrelated.by_chance) < 0.06


def test_spread_counts_dimensions_and_tells_near_rows_from_chance(tmp_path: Path) -> None:
    rows = rows_of(5)
    rows[1::2] = (
        rows[::2] + 0.01 * rows_of(6)[::2]
    )  # every word has a neighbour, which chance has not
    result = spread(stored(tmp_path, "pairs", rows), WORDS)
    values = np.linalg.eigvalsh(np.cov(rows.numpy(), rowvar=False))
    shares = values / values.sum()
    assert result.dimensions == pytest.approx(1 / np.square(shares).sum(), rel=1e-5)
    assert result.nearest.min() > 0.99
    assert result.nearest_random.median() < 0.9


def test_words_are_those_that_all_tables_hold(tmp_path: Path) -> None:
    one = stored(tmp_path, "one", rows_of(1))
    two = stored(tmp_path, "two", rows_of(2, 40), WORDS[10:50])
    assert shared_words((one, two)) == sorted(WORDS[10:50])
    assert sampled([str(i) for i in range(5000)])[-1] == "4999"
    [near] = neighbour_words(one, ["aax"], 2)
    assert len(near) == 2
    assert "aax" not in [token.strip() for token, _ in near]


def test_the_command_draws_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed, name in enumerate(("one", "two")):
        stored(tmp_path, name, rows_of(seed))
    pictures = tmp_path / "pictures"
    tables = [str(tmp_path / "one"), str(tmp_path / "two")]
    assert (
        main(["tables", "--inspect", *tables, "--words", "abx", "--pictures", str(pictures)]) == 0
    )
    text = capsys.readouterr().out
    assert "one, two" in text
    assert "nearest to 'abx'" in text
    assert (pictures / "geometry.png").stat().st_size > 10_000
    vectors = np.loadtxt(pictures / "one" / "vectors.tsv")
    words = (pictures / "one" / "words.tsv").read_text().split()
    row = load_table(tmp_path / "one").vocabulary.index(f" {words[5]}")
    np.testing.assert_allclose(vectors[5], load_table(tmp_path / "one").rows[row], rtol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--inspect", "one", "--words", "zzz"], "whole word 'zzz'"),
        (["--inspect", "one", "one"], "named twice"),
        (["--inspect", "one", "few"], "0 whole words stand in all"),
        (["--inspect", "absent"], "absent"),
        (["one", "--words", "abx"], "--words belongs to --inspect"),
    ],
)
def test_what_cannot_be_shown_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    stored(tmp_path, "one", rows_of(1))
    write_table(tmp_path, "few", num_rows=5, dim=4, seed=0)
    monkeypatch.chdir(tmp_path)
    assert main(["tables", *arguments]) != 0
    assert said in capsys.readouterr().err
