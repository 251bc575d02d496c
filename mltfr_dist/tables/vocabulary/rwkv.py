"""RWKV's vocabulary as text: an id, a Python literal and its length in bytes a line."""

from __future__ import annotations

import re

from mltfr_dist.tables.vocabulary.assemble import assemble, checked_entries
from mltfr_dist.tables.vocabulary.base import Vocabulary
from mltfr_dist.tables.vocabulary.files import Format, TokenizerFile, malformed
from mltfr_dist.tables.vocabulary.marks import PLAIN, unescape_bytes
from mltfr_dist.tables.vocabulary.neighbours import read_neighbours

_LINE = re.compile(r"""([0-9]{1,18}) (b?)(?:'(.*)'|"(.*)") ([0-9]{1,9})""")
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))")
_PLAIN = {"n": "\n", "t": "\t", "r": "\r"}


def recognises(file: TokenizerFile) -> bool:
    """Whether the first lines are written so."""
    return all(_LINE.fullmatch(line) for line in [line for line in file.lines if line][:10])


def read(file: TokenizerFile) -> Vocabulary:
    """Its vocabulary; bytes that are no whole character become U+FFFD.

    Raises:
        DataError: a line is written otherwise, or a literal has not the length stated.
    """
    pairs = []
    for number, line in enumerate(file.lines, 1):
        match = _LINE.fullmatch(line)
        literal = _bytes(match) if match else None
        if match is None or literal is None or len(literal) != int(match[5]):
            raise malformed(str(file.path), f"line {number} is no id, literal and length")
        pairs.append((literal, int(match[1])))
    beside = read_neighbours(file.path.parent)
    texts = ((literal.decode("utf-8", errors="replace"), index) for literal, index in pairs)
    kind = PLAIN, "RWKV's bytes as Python literals"
    return assemble(
        file.name,
        checked_entries(texts, str(file.path)),
        kind,
        added=beside.added,
        special=beside.special,
    )


def _bytes(match: re.Match[str]) -> bytes | None:
    """What a literal stands for; None where it is no text."""
    written = match[3] if match[3] is not None else match[4]
    if match[2]:
        return unescape_bytes(written)

    def one(escape: re.Match[str]) -> str:
        code = escape[1] or escape[2] or escape[3]
        return chr(min(int(code, 16), 0x10FFFF)) if code else _PLAIN.get(escape[4], escape[4])

    try:
        return _ESCAPE.sub(one, written).encode()
    except UnicodeEncodeError:
        return None


FORMAT = Format(recognises, read)
