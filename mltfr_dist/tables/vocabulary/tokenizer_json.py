"""``tokenizer.json`` of the tokenizers library, also under other names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mltfr_dist.tables.vocabulary.assemble import assemble, checked_entries
from mltfr_dist.tables.vocabulary.base import Vocabulary
from mltfr_dist.tables.vocabulary.evidence import Declared, decide_kind
from mltfr_dist.tables.vocabulary.files import Format, TokenizerFile, malformed
from mltfr_dist.tables.vocabulary.marks import (
    BYTE_LEVEL,
    PLAIN,
    SENTENCEPIECE,
    WORDS,
    Kind,
    with_suffix,
    wordpiece,
)
from mltfr_dist.tables.vocabulary.neighbours import added_token, read_neighbours


def recognises(file: TokenizerFile) -> bool:
    """Whether ``file`` holds a ``model`` with a ``vocab``."""
    content = file.json
    model = content.get("model") if isinstance(content, dict) else None
    return isinstance(model, dict) and "vocab" in model


def read(file: TokenizerFile) -> Vocabulary:
    """Its vocabulary, with the added tokens that it and its neighbours name.

    Raises:
        DataError: it or a neighbour is malformed.
    """
    content: dict[str, Any] = file.json
    entries = checked_entries(_pairs(content["model"]["vocab"], file), str(file.path))
    listed = content.get("added_tokens") or []
    if not isinstance(listed, list) or not all(isinstance(token, dict) for token in listed):
        raise malformed(str(file.path), "added_tokens is no list of objects")
    added = [(token.get("id"), added_token(token, file.name, str(file.path))) for token in listed]
    beside = read_neighbours(file.path.parent)
    return assemble(
        file.name,
        entries,
        _kind(content, entries.values(), file.name),
        added=[*added, *beside.added],
        special=beside.special,
    )


def _pairs(vocab: Any, file: TokenizerFile) -> Iterable[tuple[str, Any]]:
    """(token, id) of an object of ids by token, or of a list of (piece, score)."""
    if isinstance(vocab, dict):
        return vocab.items()
    if not isinstance(vocab, list):
        raise malformed(str(file.path), "model.vocab is no object and no list")
    for pair in vocab:
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)
                and type(pair[1]) in (int, float)):  # fmt: skip
            raise malformed(str(file.path), f"{pair!r} stands where [piece, score] belongs")
    return ((pair[0], index) for index, pair in enumerate(vocab))


def _kind(content: dict[str, Any], tokens: Iterable[str], source: str) -> tuple[Kind, str]:
    """The kind by the file's own components, and where they do not say, by its tokens."""
    model = content["model"]
    sections = [content.get(key) for key in ("decoder", "pre_tokenizer", "normalizer")]
    types = set(_types(sections))
    prefix, suffix = model.get("continuing_subword_prefix"), model.get("end_of_word_suffix")
    if "ByteLevel" in types:
        kind, why = BYTE_LEVEL, "by its components"
    elif model.get("type") == "WordPiece" or prefix:
        kind, why = wordpiece(str(prefix or "##")), "by its model"
    elif model.get("type") == "Unigram" or types & {"Metaspace", "ByteFallback"}:
        kind, why = SENTENCEPIECE, "by its components"
    else:
        words = model.get("type") == "WordLevel"
        declared = Declared(WORDS, "by its model") if words else None
        kind, why = (PLAIN, "by its model") if suffix else decide_kind(
            list(tokens), source, declared
        )  # fmt: skip
    return (with_suffix(kind, str(suffix)) if suffix else kind), why


def _types(sections: list[Any]) -> Iterable[str]:
    """Types of all components, nested ones too."""
    waiting = list(sections)
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            waiting += node.values()
            yield str(node.get("type"))
        elif isinstance(node, list):
            waiting += node


FORMAT = Format(recognises, read)
