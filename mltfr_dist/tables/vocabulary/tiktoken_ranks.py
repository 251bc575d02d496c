"""tiktoken files: a token in base64 and its rank, which is its id, a line (Qwen 1, Llama 3)."""

from __future__ import annotations

import base64
import binascii
import re

from mltfr_dist.tables.vocabulary.assemble import assemble, checked_entries
from mltfr_dist.tables.vocabulary.base import Vocabulary
from mltfr_dist.tables.vocabulary.files import Format, TokenizerFile, malformed
from mltfr_dist.tables.vocabulary.marks import PLAIN
from mltfr_dist.tables.vocabulary.neighbours import read_neighbours

_LINE = re.compile(
    r"((?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?) ([0-9]{1,18})"
)


def recognises(file: TokenizerFile) -> bool:
    """Whether the lines are written so; a padded one shows that no words are meant."""
    named = file.path.suffix == ".tiktoken"
    matches = [_LINE.fullmatch(line) for line in file.lines[:1000] if line]
    sure = named or any(one and one[1].endswith("=") for one in matches)
    return sure and sum(one is None for one in matches) * 100 <= len(matches)


def read(file: TokenizerFile) -> Vocabulary:
    """Its vocabulary; special tokens stand in the files beside it, if anywhere.

    Raises:
        DataError: a line is no base64 and rank, or two have one rank.
    """
    pairs = []
    for number, line in enumerate(file.lines, 1):
        match = _LINE.fullmatch(line)
        if match is None and line:
            raise malformed(str(file.path), f"line {number} is no base64 and rank")
        if match is not None:
            pairs.append((_decoded(match[1], file, number), int(match[2])))
    beside = read_neighbours(file.path.parent)
    return assemble(
        file.name,
        checked_entries(pairs, str(file.path)),
        (PLAIN, "bytes in base64 with their ranks, of tiktoken"),
        added=beside.added,
        special=beside.special,
    )


def _decoded(written: str, file: TokenizerFile, number: int) -> str:
    try:
        return base64.b64decode(written, validate=True).decode("utf-8", errors="replace")
    except binascii.Error:
        raise malformed(str(file.path), f"line {number} is no base64") from None


FORMAT = Format(recognises, read)
