"""Kinds of tokenizers by how they mark the start or the end of words, and their translation.

Strings of every tokenizer follow one convention: a token that begins a word starts with a space
(`" the"`), one that continues a word does not (`"ing"`). Vocabularies that mark a word's end and
not its start give a trailing space there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

Decode = Callable[[str], str]

WORD_START = "\u2581"
"""SentencePiece's mark of a word's start."""

BYTE_SPACE = "\u0120"
"""The space in GPT-2's alphabet of bytes."""


@dataclass(frozen=True)
class Kind:
    """How a tokenizer writes its tokens.

    Attributes:
        name: what it is called. marks: how it marks words, for the log.
        decode: a token as written to its readable text.
    """

    name: str
    marks: str
    decode: Decode


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: character to byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


ALPHABET = _byte_alphabet()


_IN_ALPHABET = re.compile(f"[{re.escape(''.join(ALPHABET))}]*")
_TO_BYTES = str.maketrans({character: chr(byte) for character, byte in ALPHABET.items()})


def is_byte_level(token: str) -> bool:
    """Whether a token is written in GPT-2's alphabet of bytes."""
    return bool(_IN_ALPHABET.fullmatch(token))


def decode_byte_level(token: str) -> str:
    """Readable text of a byte-level BPE token; U+FFFD stands for bytes that are no character."""
    if not is_byte_level(token):
        return token  # plain text already
    return token.translate(_TO_BYTES).encode("latin-1").decode("utf-8", errors="replace")


def _decode_sentencepiece(token: str) -> str:
    return token.replace(WORD_START, " ")


def _decode_continued(token: str) -> str:
    return token[:-2] if token.endswith("@@") and len(token) > 2 else token + " "


_ESCAPE = re.compile(rb"\\(x[0-9a-fA-F]{2}|.)", re.DOTALL)
_ESCAPED = {b"n": b"\n", b"t": b"\t", b"r": b"\r"}


def unescape_bytes(written: str) -> bytes:
    r"""The bytes of a Python bytes literal without its quotes (``\n``, ``\xe4``, ``\\``)."""

    def one(match: re.Match[bytes]) -> bytes:
        code = match[1]
        return bytes([int(code[1:], 16)]) if len(code) == 3 else _ESCAPED.get(code, code)

    return _ESCAPE.sub(one, written.encode())


def _decode_escaped(token: str) -> str:
    return unescape_bytes(token).decode("utf-8", errors="replace")


def wordpiece(prefix: str = "##") -> Kind:
    """The kind whose tokens start with ``prefix`` where they continue a word."""

    def decode(token: str) -> str:
        continues = token.startswith(prefix) and len(token) > len(prefix)
        return token[len(prefix) :] if continues else " " + token

    return Kind("WordPiece", f"{prefix} continues a word", decode)


def with_suffix(kind: Kind, suffix: str) -> Kind:
    """``kind`` with a mark at the word's end, which becomes a trailing space."""

    def decode(token: str) -> str:
        text = kind.decode(token.removesuffix(suffix))
        return text + " " if token.endswith(suffix) else text

    return replace(kind, marks=f"{suffix} ends a word", decode=decode)


BYTE_LEVEL = Kind("byte-level BPE", f"{BYTE_SPACE} is a space", decode_byte_level)
SENTENCEPIECE = Kind("SentencePiece", f"{WORD_START} begins a word", _decode_sentencepiece)
WORDPIECE = wordpiece()
PLAIN = Kind("plain tokens", "no marks", str)
WORDS = Kind("whole words", "every token is a word", lambda token: " " + token)
END_OF_WORD = with_suffix(replace(PLAIN, name="BPE"), "</w>")
BYTE_LEVEL_END_OF_WORD = with_suffix(BYTE_LEVEL, "</w>")
CONTINUED = Kind("BPE", "@@ is continued by the next token", _decode_continued)
ESCAPED = Kind("RWKV", "bytes as escapes", _decode_escaped)
