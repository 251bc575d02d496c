"""What a vocabulary is: readable token strings by id, and which ids carry no meaning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DropReason = Literal["special", "unused", "byte", "blank", "fragment", "no_entry", "no_row"]
"""Why a row carries no meaning of its own.

special: control tokens such as `<s>`, `[CLS]`, `<|im_start|>`; unused: reserved places such as
`[unused12]`; byte: single-byte fallbacks `<0x0A>`; blank: empty or only white space; fragment:
bytes that are no whole character; no_entry: rows without a token (padded tables); no_row: tokens
without a row (found where the table is known).
"""


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id.

    Attributes:
        tokens: readable text of each id; None where the tokenizer has no such id.
        reasons: for each id, why it would be dropped, or None for a word or a piece of one.
        source: name of the file it was read from.
        kind: which kind of tokenizer it was taken for, and on what evidence; for the log.
    """

    tokens: tuple[str | None, ...]
    reasons: tuple[DropReason | None, ...]
    source: str
    kind: str = ""
