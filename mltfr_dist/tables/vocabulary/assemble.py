"""Puts a vocabulary together from its entries, once every id is known to be sound."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from mltfr_dist.errors import DataError
from mltfr_dist.tables.vocabulary.base import DropReason, Vocabulary
from mltfr_dist.tables.vocabulary.files import malformed
from mltfr_dist.tables.vocabulary.marks import BYTE_SPACE, WORD_START, Kind
from mltfr_dist.tables.vocabulary.neighbours import AddedToken
from mltfr_dist.tables.vocabulary.special import drop_reason, form_reason, is_markup

MAX_GAPS = 1 << 20
"""Ids without a token beyond four places a token: more is damage, and would take memory."""


def checked_entries(pairs: Iterable[tuple[str, Any]], source: str) -> dict[int, str]:
    """(token, id) pairs as id to token.

    Raises:
        DataError: an id that is no whole number of 0 or more, or that two tokens share; a token
            with half a UTF-16 pair, which no file can hold.
    """
    entries: dict[int, str] = {}
    for token, index in pairs:
        try:
            token.encode()
        except UnicodeEncodeError:
            raise malformed(source, f"the token {token!r} holds half a UTF-16 pair") from None
        if type(index) is not int or index < 0:
            raise malformed(source, f"the id of {token!r} is {index!r}, no whole number from 0 on")
        if entries.setdefault(index, token) != token:
            raise malformed(source, f"{entries[index]!r} and {token!r} both have the id {index}")
    return entries


def assemble(
    source: str,
    entries: Mapping[int, str],
    kind: tuple[Kind, str],
    *,
    added: Iterable[tuple[Any, AddedToken]] = (),
    special: frozenset[str] = frozenset(),
    flags: Mapping[int, DropReason] | None = None,
) -> Vocabulary:
    """Readable tokens and drop reasons by id.

    Args:
        source: the file's name.
        entries: id to token as written.
        kind: how tokens are written, and on what evidence.
        added: (id, token) from the surest source on; what comes first is believed.
        special: texts that are named as special tokens.
        flags: what the file itself says of its tokens.

    Raises:
        DataError: no entries; an id far beyond them or that two words share.
    """
    if not entries:
        raise DataError(f"The vocabulary in {source} is empty.", remedy="Fetch the file again.")
    more: dict[int, AddedToken] = {}
    for index, token in added:
        checked_entries([(token.content, index)], token.file)
        _take(more, index, token)
    _check_size(entries, more, source)
    decode, flags = kind[0].decode, flags or {}
    size = max([*entries, *more]) + 1
    texts: list[str | None] = [None] * size
    reasons: list[DropReason | None] = ["no_entry"] * size
    for index, raw in entries.items():
        # Control tokens stand in the same list but are not written in the tokenizer's marking.
        texts[index] = text = raw if form_reason(raw) else decode(raw)
        named: DropReason | None = "special" if raw in special or text in special else None
        reasons[index] = flags.get(index) or drop_reason(raw, text) or named
    for index, token in more.items():
        own = entries.get(index)
        if own is not None and reasons[index] is None and not _same(token.content, own, decode):
            raise malformed(source, f"{own!r} has the id {index}, as {token.file} gives it to "
                            f"{token.content!r}")  # fmt: skip
        marked = own == token.content and own.startswith((WORD_START, BYTE_SPACE))
        texts[index] = text = decode(own) if own is not None and marked else token.content
        reasons[index] = drop_reason(token.content, text) or added_reason(token, special)
    return Vocabulary(tuple(texts), tuple(reasons), source, f"{kind[0].name}: {kind[1]}")


def added_reason(token: AddedToken, special: frozenset[str] = frozenset()) -> DropReason | None:
    """``special`` for an added token that is flagged or named so, or is a sign and no word."""
    sign = token.special or token.content in special or is_markup(token.content)
    return "special" if sign else None


def _take(more: dict[int, AddedToken], index: int, token: AddedToken) -> None:
    first = more.setdefault(index, token)
    if first.content == token.content:
        more[index] = AddedToken(first.content, first.special or token.special, first.file)
    elif first.file == token.file or not (added_reason(first) and added_reason(token)):
        raise malformed(token.file, f"it gives the id {index} to {token.content!r}, but "
                        f"{first.file} to {first.content!r}")  # fmt: skip


def _same(content: str, own: str, decode: Any) -> bool:
    blanks = f"{WORD_START}{BYTE_SPACE} "
    return content.strip(blanks) in (own.strip(blanks), decode(own).strip(blanks))


def _check_size(entries: Mapping[int, str], more: Mapping[int, AddedToken], source: str) -> None:
    count, last = len(entries) + len(more), max([*entries, *more])
    if last >= 4 * count + MAX_GAPS:
        token = more[last].content if last in more else entries[last]
        where = more[last].file if last in more else source
        raise malformed(where, f"the id of {token!r} is {last:,}, with {count:,} tokens in all")
