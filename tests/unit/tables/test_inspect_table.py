"""`mltfr inspect` of a token table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support import write_data
from test_store import save

from mltfr_dist.cli import main
from mltfr_dist.tables.geometry import nearest
from mltfr_dist.tables.inspect import row_norms, rows_of_word
from mltfr_dist.tables.store import TokenTable, load_table, save_table

TOKENS = (" king", "king", "queen", " Queen", "apple ", " banana")


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    rows = torch.tensor([[1.0, 0], [0.9, 0.1], [0, 1], [0.1, 1], [-1, 0], [2, 0.01]])
    described = vars(save(tmp_path, rows, name="other")) | {"name": "t", "licence": "mit"}
    for key in ("num_rows", "dim", "table_sha256", "rows_sha256", "vocabulary_sha256"):
        del described[key]
    del described["schema_version"], described["info_sha256"]
    save_table(tmp_path, rows, TOKENS, **described)
    return tmp_path / "t"


def test_it_shows_what_the_table_is(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(stored)]) == 0
    text, info = capsys.readouterr().out, load_table(stored).info
    for block in (
        "6 of 2 columns",
        "model.safetensors",
        "wte.weight [9, 2] F32",
        "tokenizer.json",
        "mit",
        "3 special",
        "scale",
        "0.5000 before, 0.0000 after",
        "0.906 at least, 1.000 in the middle, 2.000 at most",
        info.table_sha256,
        info.source_sha256,
        *map(repr, TOKENS),
    ):
        assert block in text


def test_neighbours_of_every_spelling(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(stored), "--neighbours", "king"]) == 0
    text = capsys.readouterr().out
    bare, begun = text.index("nearest to 'king' (row 1)"), text.index("nearest to ' king' (row 0)")
    assert bare < begun
    assert text[begun:].splitlines()[1].split() == ["1.000", "'", "banana'"]
    table = load_table(stored)
    assert rows_of_word(table, " king") == [0, 1]
    assert rows_of_word(table, "apple") == [4]


def test_neighbours_are_exact_over_blocks() -> None:
    rows = torch.randn(9000, 60, generator=torch.Generator().manual_seed(0))  # three blocks
    unit = torch.nn.functional.normalize(rows.double())
    for row, scores, places in zip((3, 8999), *nearest(rows, [3, 8999], 10), strict=True):
        cosines = unit @ unit[row]
        cosines[row] = -2
        best = cosines.topk(10)
        assert places.tolist() == best.indices.tolist()
        assert scores.tolist() == pytest.approx(best.values.tolist(), abs=1e-6)
    norms = rows.norm(dim=1)
    assert row_norms(rows) == pytest.approx(
        (float(norms.min()), float(norms.median()), float(norms.max()))
    )


@pytest.mark.parametrize(("word", "near"), [("kings", "'king'"), ("QUEEN", "'queen', ' Queen'")])
def test_a_word_that_is_not_there(
    stored: Path, word: str, near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(stored), "--neighbours", word]) == 2
    error = capsys.readouterr().err
    assert f"No token of the table t is {word!r}" in error
    assert near in error
    assert main(["inspect", str(stored), "--neighbours", "zzz"]) == 2
    assert "without --neighbours" in capsys.readouterr().err


def test_what_the_folder_holds_decides(
    stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "prepared")
    assert main(["inspect", str(data)]) == 0
    assert "interactions" in capsys.readouterr().out
    for arguments, message in (
        ([data, "--neighbours", "a"], f"{data} is prepared data. Leave --neighbours out."),
        ([stored, "--output", tmp_path], f"{stored} is a token table. Leave --output out."),
        ([tmp_path], f"Name one of those inside it: {tmp_path}/other, {stored}."),
        ([tmp_path / "tt"], f"did you mean {stored}?"),
        ([tmp_path / "prepared/data/none"], "does not exist, so it holds neither prepared data"),
    ):
        assert main(["inspect", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert message in error
    assert "manifest.json" in error
    assert "table.json" in error


def test_a_damaged_table_is_not_shown(stored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = stored / "vocabulary.json"
    path.write_text(path.read_text().replace("queen", "quean"))
    assert main(["inspect", str(stored)]) == 2
    assert "vocabulary.json was changed" in capsys.readouterr().err


def test_a_table_of_two_rows(tmp_path: Path) -> None:
    save(tmp_path, torch.eye(2), name="two")
    table: TokenTable = load_table(tmp_path / "two")
    cosines, places = nearest(table.rows, [0], 1)
    assert (cosines.tolist(), places.tolist()) == ([[0.0]], [[1]])
