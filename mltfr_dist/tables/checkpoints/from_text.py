"""Word vectors as text: GloVe's and word2vec's files, a line `word v1 ... vD` for each word.

Words are whole, so they follow the convention of vocabularies: `" word"`. A word may hold blanks.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from mltfr_dist.errors import DataError
from mltfr_dist.tables.checkpoints.layout import Layout
from mltfr_dist.tables.checkpoints.source import EmbeddingSource, licence_of
from mltfr_dist.tables.vocabulary import DropReason, Vocabulary, drop_reason

_LONGEST_LINE = 1 << 20
_TRIED_LINES = 100
_FASTTEXT_MAGIC = (793712314).to_bytes(4, "little")
_HEADER = re.compile(rb"(\d+) (\d+)\s*")


@dataclass(frozen=True)
class _Shape:
    """How a file is laid out: bytes of its header line, its word count there, and D_m."""

    skipped: int
    stated: int | None
    dim: int


def open_word_vectors(folder: Path, layout: Layout, asked: str | None) -> EmbeddingSource:
    """The vectors of one text file; it is read through once to see where its lines are.

    Args:
        folder: of the file.
        layout: names the file.
        asked: must be None; there is but one table.

    Raises:
        DataError: a line that is not a word and D numbers, or fewer lines than the header states.
    """
    path = folder / layout.files[0]
    if asked is not None:
        raise DataError(
            f"{path} holds word vectors: one table, without a name.", remedy="Leave out --tensor."
        )
    shape = _shape(path)
    words, starts, doubled = _scan(path, shape)
    dim = shape.dim

    def read_rows(start: int, stop: int) -> tuple[bytes, torch.Tensor]:
        with path.open("rb") as file:
            file.seek(int(starts[start]))
            raw = file.read(int(starts[stop] - starts[start]))
        rows = np.empty((stop - start, dim), dtype=np.float32)
        for index, line in enumerate(raw.split(b"\n")[: stop - start]):
            try:
                rows[index] = [float(field) for field in _fields(line)[-dim:]]
            except ValueError as error:
                raise _refused(path, f"in row {start + index + 1}, {error}") from None
        return raw, torch.from_numpy(rows)

    shown = ", ".join(repr(word) for word in list(doubled)[:5])
    note = (
        f"; {len(doubled)} words come more than once ({shown}): their first rows are kept"
        if doubled
        else ""
    )
    return EmbeddingSource(
        (path.name,),
        "word vectors",
        f"the format (a word and {dim} numbers a line{note})",
        len(words),
        dim,
        "text",
        licence_of(folder),
        lambda: _vocabulary(words, path.name),
        read_rows,
    )


def _vocabulary(words: list[str], source: str) -> Vocabulary:
    tokens: list[str | None] = []
    reasons: list[DropReason | None] = []
    seen: set[str] = set()
    for word in words:
        text = " " + word
        tokens.append(None if word in seen else text)
        reasons.append("no_entry" if word in seen else drop_reason(word, text))
        seen.add(word)
    return Vocabulary(tuple(tokens), tuple(reasons), source)


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while line := file.readline(_LONGEST_LINE):
            if len(line) == _LONGEST_LINE:
                raise _refused(path, "a line is over 1 MiB long")
            yield line


def _shape(path: Path) -> _Shape:
    """Told from the first lines: a header `V D`, or else what most of them hold."""
    first = list(islice(_lines(path), _TRIED_LINES))
    header = _HEADER.fullmatch(first[0]) if first else None
    if header and len(first) > 1:
        num_words, dim = int(header[1][:18]), int(header[2][:18])
        lines, skipped, stated = first[1:], len(first[0]), num_words
    else:
        counts = Counter(len(_fields(line)) for line in first).most_common(1)
        lines, skipped, stated, dim = first, 0, None, (counts[0][0] if counts else 0) - 1
    if dim < 2 or any(_word(line, dim) is None for line in lines):
        raise _refused(path, "its lines are not a word and numbers, as many on each")
    return _Shape(skipped, stated, dim)


def _scan(path: Path, shape: _Shape) -> tuple[list[str], np.ndarray, dict[str, None]]:
    """The words, where their lines start (and the last one ends), and the words that come again."""
    words: list[str] = []
    starts = [shape.skipped]
    seen: set[str] = set()
    doubled: dict[str, None] = {}
    position = 0
    for line in _lines(path):
        position += len(line)
        if position <= shape.skipped:
            continue
        word = _word(line, shape.dim)
        if word is None:
            raise _refused(path, f"row {len(words) + 1} is not a word and {shape.dim} numbers")
        text = word.decode("utf-8", errors="replace")
        if text in seen and "\ufffd" not in text:
            doubled[text] = None
        seen.add(text)
        words.append(text)
        starts.append(position)
    if shape.stated is not None and shape.stated != len(words):
        raise DataError(
            f"{path} states {shape.stated:,} words and holds {len(words):,}.",
            remedy="Fetch the file again; it is cut short.",
        )
    return words, np.array(starts, dtype=np.int64), doubled


def _fields(line: bytes) -> list[bytes]:
    # Blanks and tabs alone: words hold other white space, such as U+00A0 or U+0085.
    return line.rstrip(b" \t\r\n").replace(b"\t", b" ").split(b" ")


def _word(line: bytes, dim: int) -> bytes | None:
    """The word of a line; None if the line is no word and ``dim`` numbers."""
    fields = _fields(line)
    if len(fields) <= dim:
        return None
    try:
        float(fields[-1]), float(fields[-dim])
    except ValueError:
        return None
    return b" ".join(fields[:-dim])


def _refused(path: Path, what: str) -> DataError:
    return DataError(
        f"{path} is no .safetensors and no .gguf file, nor word vectors: {what}.",
        rule="A text file (.vec, .txt) holds a word and its numbers on each line, "
        "after an optional line with the counts of words and numbers.",
        remedy="Give a checkpoint's folder or file; a list of words goes with --vocabulary PATH.",
    )


def refuse_binary_vectors(path: Path) -> None:
    """Raise DataError if a ``.bin`` file is word2vec's or fastText's, and not a pickle."""
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(_FASTTEXT_MAGIC):
        raise DataError(
            f"{path} is a binary model of fastText.",
            rule="Word vectors are read as text.",
            remedy="Give the .vec file that fastText writes beside it.",
        )
    if re.match(rb"\d+ \d+\n", head):
        raise DataError(
            f"{path} holds word vectors in word2vec's binary format.",
            rule="Word vectors are read as text.",
            remedy="Convert it in Python with the package gensim: "
            f'KeyedVectors.load_word2vec_format("{path}", binary=True)'
            f'.save_word2vec_format("{path.with_suffix(".vec")}"), and give the new file.',
        )
