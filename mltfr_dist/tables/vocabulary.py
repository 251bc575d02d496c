"""A tokenizer's vocabulary: readable token strings by id, and which ids carry no meaning of their own.

Strings of every tokenizer follow one convention: a token that begins a word starts with a space (`" the"`), one that
continues a word does not (`"ing"`). Byte-level BPE, sentencepiece and WordPiece markings are translated to it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mltfr_dist.errors import DataError

DropReason = Literal["special", "unused", "byte", "blank", "fragment", "no_entry", "no_row"]
"""Why a row carries no meaning of its own.

special: control tokens such as `<s>`, `[CLS]`, `<|im_start|>`; unused: reserved places such as `[unused12]`;
byte: single-byte fallbacks `<0x0A>`; blank: empty or only white space; fragment: bytes that are no whole character;
no_entry: rows without a token (padded tables); no_row: tokens without a row (extract.py finds
    them).
"""

VOCABULARY_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")
"""Where a vocabulary is looked for beside a checkpoint, best first."""

Decode = Callable[[str], str]

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_UNUSED = re.compile(
    r"[<\[](unused_?\d+|PAD\d+|extra_id_\d+|reserved_special_token_\d+)[>\]]|<\|reserved\w*\|>|madeupword\d+"
)
# Named one by one: `<...>` and `[...]` alone would also match ordinary pieces of code and HTML (`<div>`, `[i]`).
_CONTROL = re.compile(
    r"<\|.*\|>|</?(s|unk|pad|mask|bos|eos|cls|sep|image|start_of_\w+|end_of_\w+|begin_of_\w+|fim_\w+|repo_name|file_sep)>"
    r"|\[(CLS|SEP|PAD|UNK|MASK|BOS|EOS|/?INST)\]|<<?/?SYS>>?"
)


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id.

    Attributes:
        tokens: readable text of each id; None where the tokenizer has no such id.
        reasons: for each id, why it would be dropped, or None for a word or a piece of one.
        source: name of the file it was read from.
        kind: which kind of tokenizer it was taken for, and why; for the log.
    """

    tokens: tuple[str | None, ...]
    reasons: tuple[DropReason | None, ...]
    source: str
    kind: str = ""


def read_vocabulary(path: Path) -> Vocabulary:
    """Read ``tokenizer.json`` (or a ``*_config.json`` with the same content), ``vocab.json`` or ``vocab.txt``.

    Raises:
        DataError: the file is missing, malformed or holds no vocabulary.
    """
    if not path.is_file():
        raise DataError(
            f"The vocabulary file {path} does not exist.",
            remedy="Give the path of a tokenizer.json or vocab.txt.",
        )
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(
            f"The vocabulary file {path} cannot be read: {error}.", remedy="Fetch it again."
        ) from None
    if content is None:
        entries: dict[int, str] = dict(enumerate(text.removesuffix("\n").split("\n")))
        return _assemble(
            entries, _plain_decoder(entries.values()), _side_tokens(path.parent), path.name
        )
    if (
        isinstance(content, dict)
        and isinstance(content.get("model"), dict)
        and "vocab" in content["model"]
    ):
        return _from_tokenizer_json(content, path)
    if (
        isinstance(content, dict)
        and content
        and all(isinstance(value, int) for value in content.values())
    ):
        entries = {int(index): token for token, index in content.items()}
        return _assemble(
            entries, _plain_decoder(entries.values()), _side_tokens(path.parent), path.name
        )
    raise DataError(
        f"{path} holds no vocabulary.",
        rule="A tokenizer.json has model.vocab; a vocab.json maps tokens to ids.",
        remedy="Give the tokenizer.json of this checkpoint as the vocabulary.",
    )


def find_vocabulary(folder: Path) -> Vocabulary:
    """The vocabulary beside a checkpoint.

    Raises:
        DataError: no file of :data:`VOCABULARY_FILES` in ``folder`` holds one.
    """
    for name in VOCABULARY_FILES:
        path = folder / name
        if not path.is_file():
            continue
        # Most checkpoints' tokenizer_config.json holds settings only; in some it is the tokenizer.json itself.
        if name == "tokenizer_config.json" and '"vocab"' not in path.read_text(encoding="utf-8"):
            continue
        return read_vocabulary(path)
    raise DataError(
        f"No vocabulary in {folder}: none of {', '.join(VOCABULARY_FILES)} holds one.",
        rule="Every row of a token table needs its token.",
        remedy="Put the checkpoint's tokenizer.json there or name it with vocabulary=PATH "
        "(a sentencepiece tokenizer.model is turned into one by transformers' save_pretrained).",
    )


def from_ggml(tokens: list[str], types: list[int] | None, model: str, source: str) -> Vocabulary:
    """Vocabulary of a GGUF file.

    Args:
        tokens: ``tokenizer.ggml.tokens``.
        types: ``tokenizer.ggml.token_type`` (1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte) or None.
        model: ``tokenizer.ggml.model``: ``gpt2`` is byte-level BPE, the others mark word starts by U+2581.
        source: the file's name.
    """
    flags: dict[int, DropReason] = {2: "special", 3: "special", 5: "unused", 6: "byte"}
    decode = decode_byte_level if model == "gpt2" else _decode_sentencepiece
    texts, reasons = [], []
    for index, token in enumerate(tokens):
        kind = types[index] if types is not None else 1
        text = decode(token) if kind == 1 else token  # the others are stored as they are
        texts.append(text)
        reasons.append(flags.get(kind) or drop_reason(token, text))
    return Vocabulary(tuple(texts), tuple(reasons), source)


def drop_reason(raw: str, text: str) -> DropReason | None:
    """Why a token carries no meaning of its own, judged by its raw and its readable form; None: it does."""
    if _BYTE.fullmatch(raw):
        return "byte"
    if _UNUSED.fullmatch(raw):
        return "unused"
    if _CONTROL.fullmatch(raw):
        return "special"
    if not text.strip():
        return "blank"
    return "fragment" if "\ufffd" in text else None


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: character to byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


_ALPHABET = _byte_alphabet()


def decode_byte_level(token: str) -> str:
    """Readable text of a byte-level BPE token; U+FFFD stands for bytes that are no whole character."""
    if any(character not in _ALPHABET for character in token):
        return token  # not written in the alphabet: plain text already
    return bytes(_ALPHABET[character] for character in token).decode("utf-8", errors="replace")


def _decode_sentencepiece(token: str) -> str:
    return token.replace("\u2581", " ")


def _decode_wordpiece(token: str) -> str:
    return token[2:] if token.startswith("##") and len(token) > 2 else " " + token


def _with_suffix(decode: Decode, suffix: str) -> Decode:
    """Vocabularies that mark a word's end, not its start (`</w>`): the mark becomes a trailing space."""
    return lambda token: (
        decode(token.removesuffix(suffix)) + (" " if token.endswith(suffix) else "")
    )


def _plain_decoder(tokens: Iterable[str]) -> Decode:
    """The decoder of a bare token list, told by the markings that occur in it."""
    tokens = list(tokens)
    if any(token.startswith("##") and len(token) > 2 for token in tokens):
        return _decode_wordpiece
    decode = (
        decode_byte_level
        if any(token.startswith("\u0120") for token in tokens)
        else _decode_sentencepiece
    )
    return (
        _with_suffix(decode, "</w>") if any(token.endswith("</w>") for token in tokens) else decode
    )


def _mentions(node: Any, kind: str) -> bool:
    """Whether a tokenizer.json component, or one nested in it, is of type ``kind``."""
    if isinstance(node, dict):
        return node.get("type") == kind or any(_mentions(value, kind) for value in node.values())
    return isinstance(node, list) and any(_mentions(value, kind) for value in node)


def _from_tokenizer_json(content: dict[str, Any], path: Path) -> Vocabulary:
    model = content["model"]
    try:
        if isinstance(model["vocab"], dict):
            entries = {int(index): str(token) for token, index in model["vocab"].items()}
        else:  # Unigram: a list of [token, score]
            entries = {index: str(pair[0]) for index, pair in enumerate(model["vocab"])}
        added = {
            int(token["id"]): (str(token["content"]), bool(token["special"]))
            for token in content.get("added_tokens") or ()
        }
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DataError(
            f"The vocabulary in {path} is malformed: {error!r}.", remedy="Fetch the file again."
        ) from None
    if _mentions(content.get("decoder"), "ByteLevel") or _mentions(
        content.get("pre_tokenizer"), "ByteLevel"
    ):
        decode: Decode = decode_byte_level
    elif model.get("type") == "WordPiece" or model.get("continuing_subword_prefix") == "##":
        decode = _decode_wordpiece
    else:
        decode = _decode_sentencepiece
    if model.get("end_of_word_suffix"):
        decode = _with_suffix(decode, str(model["end_of_word_suffix"]))
    return _assemble(entries, decode, added, path.name)


def _side_tokens(folder: Path) -> dict[int, tuple[str, bool]]:
    """Tokens that a bare vocabulary's neighbours add: ``added_tokens_decoder`` of tokenizer_config.json, added_tokens.json."""
    added: dict[int, tuple[str, bool]] = {}
    if (folder / "added_tokens.json").is_file():
        more = json.loads((folder / "added_tokens.json").read_text(encoding="utf-8"))
        added |= {int(index): (token, False) for token, index in more.items()}
    if (folder / "tokenizer_config.json").is_file():
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        for index, token in settings.get("added_tokens_decoder", {}).items():
            added[int(index)] = (token["content"], bool(token.get("special")))
    return added


def _assemble(
    entries: Mapping[int, str], decode: Decode, added: Mapping[int, tuple[str, bool]], source: str
) -> Vocabulary:
    """Readable tokens and drop reasons by id. ``added`` (id to text and special flag) wins: added tokens are plain text."""
    if not entries:
        raise DataError(
            f"The vocabulary in {source} is empty.", remedy="Fetch the tokenizer's file again."
        )
    size = max([*entries, *added]) + 1
    texts: list[str | None] = [None] * size
    reasons: list[DropReason | None] = ["no_entry"] * size
    for index, token in entries.items():
        # Control tokens stand in the same list but are not written in the tokenizer's marking.
        marked = not (
            _CONTROL.fullmatch(token) or _UNUSED.fullmatch(token) or _BYTE.fullmatch(token)
        )
        texts[index] = text = decode(token) if marked else token
        reasons[index] = drop_reason(token, text)
    for index, (token, special) in added.items():
        texts[index] = token
        reasons[index] = drop_reason(token, token) or ("special" if special else None)
    return Vocabulary(tuple(texts), tuple(reasons), source)
