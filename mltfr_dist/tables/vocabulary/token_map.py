"""``vocab.json``: an object of ids by token."""

from __future__ import annotations

from typing import Any

from mltfr_dist.errors import DataError
from mltfr_dist.tables.vocabulary.assemble import assemble, checked_entries
from mltfr_dist.tables.vocabulary.base import Vocabulary
from mltfr_dist.tables.vocabulary.evidence import decide_kind, declared_kind
from mltfr_dist.tables.vocabulary.files import Format, TokenizerFile
from mltfr_dist.tables.vocabulary.neighbours import declared_names, read_neighbours

MERGES_FILE = "merges.txt"
"""Stands beside a vocab.json of a BPE, never beside one of WordPiece."""


def recognises(file: TokenizerFile) -> bool:
    """Whether ``file`` holds JSON that is not yet known to be something else."""
    return file.json is not None


def read(file: TokenizerFile) -> Vocabulary:
    """Its vocabulary, with the added tokens that its neighbours name.

    Raises:
        DataError: it holds no vocabulary, an id is malformed, or its kind is in doubt.
    """
    content: Any = file.json
    # A number in any place says that ids by token are meant; then every one has to be an id.
    if not isinstance(content, dict) or not any(
        isinstance(index, int | float) for index in content.values()
    ):
        raise DataError(
            f"{file.path} holds no vocabulary.",
            rule="A tokenizer.json has model.vocab; a vocab.json maps tokens to ids.",
            remedy="Give the tokenizer.json of this checkpoint with --vocabulary PATH.",
        )
    entries = checked_entries(content.items(), str(file.path))
    folder = file.path.parent
    beside = read_neighbours(folder)
    declared = declared_kind(declared_names(folder, beside.settings))
    own = {token.content for _, token in beside.added} | beside.special
    words = [token for token in entries.values() if token not in own]
    return assemble(
        file.name,
        entries,
        decide_kind(words, file.name, declared, has_merges=(folder / MERGES_FILE).exists()),
        added=beside.added,
        special=beside.special,
    )


FORMAT = Format(recognises, read)
