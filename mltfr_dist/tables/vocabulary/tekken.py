"""Mistral's ``tekken.json``: special tokens first, then tokens in base64 by rank."""

from __future__ import annotations

import base64
from typing import Any

from mltfr_dist.tables.vocabulary.assemble import assemble, checked_entries
from mltfr_dist.tables.vocabulary.base import DropReason, Vocabulary
from mltfr_dist.tables.vocabulary.files import Format, TokenizerFile, malformed
from mltfr_dist.tables.vocabulary.marks import PLAIN


def recognises(file: TokenizerFile) -> bool:
    """Whether ``file`` has a ``config`` and a list ``vocab``, as no other format has."""
    content = file.json
    return (
        isinstance(content, dict)
        and isinstance(content.get("config"), dict)
        and isinstance(content.get("vocab"), list)
    )


def read(file: TokenizerFile) -> Vocabulary:
    """Its vocabulary: as many ids as ``default_vocab_size`` says, the first ones special.

    Raises:
        DataError: a size, a rank or a token's bytes are missing or malformed.
    """
    content: dict[str, Any] = file.json
    size, first = (
        _whole(content["config"].get(name), file, name)
        for name in ("default_vocab_size", "default_num_special_tokens")
    )
    specials = content.get("special_tokens") or []
    if not isinstance(specials, list):
        raise malformed(str(file.path), "special_tokens is no list")
    named = [(_field(one, "token_str", file), _rank(one, file)) for one in specials]
    tokens = [
        (_decoded(one, file), first + _rank(one, file))
        for one in content["vocab"]
        if first + _rank(one, file) < size
    ]
    entries = checked_entries([*named, *tokens], str(file.path))
    flags: dict[int, DropReason] = {index: "special" for _, index in named}
    kind = PLAIN, f"bytes in base64 after {first:,} special tokens, of tekken"
    return assemble(file.name, entries, kind, flags=flags)


def _whole(value: Any, file: TokenizerFile, name: str) -> int:
    if type(value) is not int or value < 0:
        raise malformed(str(file.path), f"{name} is {value!r}, no whole number from 0 on")
    return value


def _rank(entry: Any, file: TokenizerFile) -> int:
    return _whole(entry.get("rank") if isinstance(entry, dict) else entry, file, "a rank")


def _field(entry: Any, name: str, file: TokenizerFile) -> str:
    text = entry.get(name) if isinstance(entry, dict) else None
    if not isinstance(text, str):
        raise malformed(str(file.path), f"{entry!r} has no {name}")
    return text


def _decoded(entry: Any, file: TokenizerFile) -> str:
    written = _field(entry, "token_bytes", file)
    try:
        return base64.b64decode(written, validate=True).decode("utf-8", errors="replace")
    except ValueError:
        raise malformed(str(file.path), f"{written!r} is no base64") from None


FORMAT = Format(recognises, read)
