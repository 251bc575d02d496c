"""GloVe's and word2vec's text files."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mltfr_dist.config import TableConfig
from mltfr_dist.errors import DataError
from mltfr_dist.tables.checkpoints import open_embedding
from mltfr_dist.tables.extract import extract_table

RAW = TableConfig(normalise="none")
WORDS = [
    "the",
    ". . .",
    "at name@domain.com",
    "café",
    "a\u00a0b",
    "x\u0085y",
    "<unk>",
    "12",
    "日本",
]


def write(
    path: Path, words: list[str], *, dim: int = 5, header: str = "", end: str = "\n"
) -> np.ndarray:
    rows = np.random.default_rng(0).normal(size=(len(words), dim))
    lines = [
        f"{word} {' '.join(f'{value:.5g}' for value in row)}{end}" for word, row in zip(words, rows)
    ]
    path.write_bytes((header + "".join(lines)).encode())
    return np.array(
        [[np.float32(f"{value:.5g}") for value in row] for row in rows], dtype=np.float32
    )


@pytest.mark.parametrize("header", ["", f"{len(WORDS)} 5\n"])
@pytest.mark.parametrize("end", ["\n", " \n", "\r\n"])
@pytest.mark.parametrize("name", ["x.vec", "glove.txt"])
def test_rows_and_words(
    tmp_path: Path, header: str, end: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mltfr_dist.tables.checkpoints.source.BLOCK_BYTES", 4 * 5 * 4)
    rows = write(tmp_path / name, WORDS, header=header, end=end)
    source = open_embedding(tmp_path / name)
    assert (source.num_rows, source.dim) == rows.shape
    read = torch.cat([block for _, block in source.blocks()])
    assert np.array_equal(read.numpy(), rows)
    assert source.read_vocabulary().tokens == tuple(" " + word for word in WORDS)
    extracted = extract_table(str(tmp_path / name), RAW)
    assert extracted.vocabulary == tuple(" " + word for word in WORDS if word != "<unk>")
    assert extracted.dropped == {"special": 1}


def test_tabs_and_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x.vec").write_text("the\t1\t2\nof\t3\t-4e-1\n")
    source = open_embedding(tmp_path)
    assert source.read_rows(0, 2)[1].tolist() == [[1, 2], [3, pytest.approx(-0.4)]]
    (tmp_path / "y.vec").touch()
    with pytest.raises(DataError, match=r"2 files of word vectors: x\.vec, y\.vec"):
        open_embedding(tmp_path)
    with pytest.raises(DataError, match=r"Leave out --tensor"):
        open_embedding(tmp_path / "x.vec", "wte.weight")


def test_a_word_that_comes_twice_is_named_and_its_first_row_kept(tmp_path: Path) -> None:
    rows = write(tmp_path / "x.vec", ["the", "of", "the", "and"])
    extracted = extract_table(str(tmp_path / "x.vec"), RAW)
    assert "1 words come more than once ('the')" in extracted.source.chosen_by
    assert extracted.vocabulary == (" the", " of", " and")
    assert np.array_equal(extracted.rows.numpy(), rows[[0, 1, 3]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a word and numbers"),
        ("the\nof\n", "not a word and numbers"),
        ("the 900\nof 800\n", "not a word and numbers"),  # a fairseq dictionary
        ("#version: 0.2\nĠ t\nĠ a\n", "not a word and numbers"),
        ("IQ== 0\nIg== 1\n", "not a word and numbers"),  # tiktoken
        ("the 1 2 3\nof 1 2\nand 1 2 3\n", "not a word and numbers"),
        ("the 1 2 x\nof 1 2 x\n", "not a word and numbers"),
        ("3 2\nthe 1 2\nof 1 2\n", "states 3 words and holds 2"),
        ("2 3\nthe 1 2\nof 1 2\n", "not a word and numbers"),
        ("the 1 2\n" * 200 + "of 1\n", r"row 201 is not a word and 2 numbers"),
        ("\0" * (1 << 21), "over 1 MiB long"),
        (f"{10**30} {10**30}\nthe 1 2\n", "not a word and numbers"),
    ],
)
def test_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "x.txt").write_text(content)
    with pytest.raises(DataError, match=message):
        open_embedding(tmp_path / "x.txt")


def test_numbers_within_a_line_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "x.vec").write_text("the 1 2 3\nof 1 x 3\n")
    with pytest.raises(DataError, match=r"x\.vec .*in row 2, could not convert"):
        list(open_embedding(tmp_path / "x.vec").blocks())


def test_binary_vectors_are_no_pickles(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    path.write_bytes(b"2 3\nthe " + bytes(12) + b"of " + bytes(12))
    for source in (tmp_path, path):
        with pytest.raises(DataError, match=r"word2vec's binary format.*load_word2vec_format"):
            open_embedding(source)
    path.write_bytes((793712314).to_bytes(4, "little") + bytes(99))
    with pytest.raises(DataError, match=r"binary model of fastText.*Give the \.vec file"):
        open_embedding(path)
    path.write_bytes(b"PK\3\4")
    with pytest.raises(DataError, match="only as pickles"):
        open_embedding(path)
