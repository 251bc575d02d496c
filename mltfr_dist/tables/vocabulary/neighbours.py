"""What the files beside a vocabulary say: added tokens, names of special ones, the class."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mltfr_dist.errors import DataError
from mltfr_dist.tables.vocabulary.files import malformed, open_file

ADDED_TOKENS = "added_tokens.json"
SETTINGS = "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
CONFIG = "config.json"

MODEL_TYPE = "model_type"
_GENERIC = ("", "auto", "pretrained", "tokenizersbackend", "pythonbackend", "sentencepiecebackend")

NEIGHBOUR_FILES = (ADDED_TOKENS, SETTINGS, SPECIAL_TOKENS, CONFIG)
"""Files that are looked at beside a vocabulary."""


@dataclass(frozen=True)
class AddedToken:
    """A token that was added to a vocabulary after its training; it is plain text.

    Attributes:
        content: the text. special: whether it is flagged as one. file: where it stands.
    """

    content: str
    special: bool
    file: str


@dataclass(frozen=True)
class Neighbours:
    """What stands beside a vocabulary.

    Attributes:
        added: (id, token), what is believed first standing first.
        special: texts that are named as special tokens.
        settings: the content of tokenizer_config.json.
    """

    added: tuple[tuple[Any, AddedToken], ...] = ()
    special: frozenset[str] = frozenset()
    settings: dict[str, Any] = field(default_factory=dict)


def read_neighbours(folder: Path) -> Neighbours:
    """Read tokenizer_config.json, special_tokens_map.json and added_tokens.json where they exist.

    Raises:
        DataError: one of them is damaged.
    """
    settings, names = _read(folder / SETTINGS), _read(folder / SPECIAL_TOKENS)
    decoder = settings.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise malformed(str(folder / SETTINGS), "added_tokens_decoder is no object")
    added = [
        (_number(index), added_token(token, SETTINGS, str(folder / SETTINGS)))
        for index, token in decoder.items()
    ]
    added += [
        (index, AddedToken(content, False, ADDED_TOKENS))
        for content, index in _read(folder / ADDED_TOKENS).items()
    ]
    special = frozenset(_special_names(settings)) | frozenset(_special_names(names))
    return Neighbours(tuple(added), special - {""}, settings)


def declared_names(folder: Path, settings: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, where it stands) of the tokenizer's class, or of the model's type without a class.

    Names come in lower case without ``Tokenizer``, ``Fast``, ``-`` and ``_``. A type says less
    than a class (BARThez is of type mbart, PhoBERT of type roberta), so it never stands beside one.

    Raises:
        DataError: config.json is damaged.
    """
    config = _read(folder / CONFIG)
    declared = (
        (settings.get("tokenizer_class"), f"tokenizer_class of {SETTINGS}"),
        (config.get("tokenizer_class"), f"tokenizer_class of {CONFIG}"),
        (config.get("model_type"), f"{MODEL_TYPE} of {CONFIG}"),
    )
    for name, where in declared:
        bare = re.sub(r"Tokenizer(Fast)?$|[-_]", "", str(name or "")).lower()
        if bare not in _GENERIC:
            yield bare, where
            return


def added_token(token: Any, file: str, where: str) -> AddedToken:
    """An added token from its JSON object; ``where`` names the file in errors."""
    special = token.get("special", False) if isinstance(token, dict) else None
    if not isinstance(special, bool) or not isinstance(token.get("content"), str):
        raise malformed(where, f"{token!r} is no added token (content and special)")
    return AddedToken(token["content"], special, file)


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = open_file(path).json
    except DataError as error:
        raise DataError(
            f"{path}, which stands beside the vocabulary, is damaged. {error.what}",
            remedy="Fetch it again (`git lfs pull` fetches what git-lfs left out), or remove it if "
            "nothing needs it.",
        ) from None
    if not isinstance(content, dict):
        raise malformed(str(path), "it holds no JSON object")
    return content


def _number(index: str) -> int | str:
    """An id that stands as a key, as a number if it is one; else as it is, to be refused."""
    return int(index) if re.fullmatch(r"[0-9]{1,18}", index) else index


def _special_names(settings: dict[str, Any]) -> Iterator[str]:
    """Texts under ``*_token`` and in lists of further special tokens."""
    for key, value in settings.items():
        if key.endswith("_token"):
            yield from _texts([value])
        elif key.endswith("_special_tokens"):  # additional_, extra_, model_specific_
            yield from _texts(value.values() if isinstance(value, dict) else value)


def _texts(values: Any) -> Iterator[str]:
    for value in values if not isinstance(values, str | bool | int | float | None) else ():
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            yield text
