"""Extracts a language model's input-embedding table and its vocabulary, and nothing else of the checkpoint.

Memory: the kept rows in float32, once, and a block of a few megabytes, however large the checkpoint is.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from mltfr_dist.config import TableConfig
from mltfr_dist.errors import DataError
from mltfr_dist.tables import hub
from mltfr_dist.tables.checkpoints import EmbeddingSource, open_embedding
from mltfr_dist.tables.vocabulary import DropReason, Vocabulary, read_vocabulary


@dataclass(frozen=True)
class ExtractedTable:
    """Rows as stored in the checkpoint, less those dropped.

    Attributes:
        rows: [V_m, D_m] float32, not normalised.
        vocabulary: the token of each row.
        dropped: rows dropped by reason, most frequent first.
        source: where the rows come from.
        source_name: default name of the table, from the source's own name.
        source_sha256: of the tensor's bytes as stored, dropped rows included.
        revision: commit of a checkpoint from the hub, else None.
        vocabulary_file: name of the file that the tokens come from.
    """

    rows: torch.Tensor
    vocabulary: tuple[str, ...]
    dropped: dict[DropReason, int]
    source: EmbeddingSource
    source_name: str
    source_sha256: str
    revision: str | None
    vocabulary_file: str


def extract_table(source: str, config: TableConfig) -> ExtractedTable:
    """Read the embedding table of ``source``.

    Args:
        source: a ``.safetensors`` or ``.gguf`` file, a checkpoint folder, or a hub id (``owner/name`` or
            ``owner/name@revision``), of which only the one weight file that holds the table is fetched.
        config: which tensor and vocabulary, and whether special tokens stay.

    Raises:
        DataError: no certain embedding, no vocabulary, or the two disagree.
    """
    path, revision = Path(source), None
    name = path.stem if path.suffix in (".safetensors", ".gguf") else path.absolute().name
    if not path.exists() and (parts := hub.parse_hub_id(source)):
        name = parts[0].rpartition("/")[2]
        path, revision = hub.fetch(*parts, config.tensor)
    embedding = open_embedding(path, config.tensor)
    vocabulary = (
        read_vocabulary(config.vocabulary) if config.vocabulary else embedding.read_vocabulary()
    )
    kept, tokens, dropped = _choose_rows(embedding, vocabulary, keep_special=config.keep_special)
    digest = hashlib.sha256()
    rows = torch.empty(len(tokens), embedding.dim)
    filled = 0
    for start, block in embedding.blocks(digest):  # block [n, D_m]
        chosen = block[kept[start : start + len(block)]]
        if not bool(torch.isfinite(chosen).all()):
            raise DataError(
                f"{embedding.tensor} of {source} holds infinite values or NaN.",
                remedy="Fetch the checkpoint again.",
            )
        rows[filled : filled + len(chosen)] = chosen
        filled += len(chosen)
    return ExtractedTable(
        rows, tokens, dropped, embedding, name, digest.hexdigest(), revision, vocabulary.source
    )


def _choose_rows(
    source: EmbeddingSource, vocabulary: Vocabulary, *, keep_special: bool
) -> tuple[torch.Tensor, tuple[str, ...], dict[DropReason, int]]:
    """The kept rows as a mask [rows in the source], their tokens, and the dropped ones counted by reason."""
    if len(vocabulary.tokens) > source.num_rows:
        raise DataError(
            f"{source.tensor} has {source.num_rows} rows but the vocabulary in {vocabulary.source} has "
            f"{len(vocabulary.tokens)} ids.",
            rule="Every id needs its row (rows beyond the vocabulary are padding and are dropped).",
            remedy="Give the vocabulary of this very checkpoint with vocabulary=PATH.",
        )
    reasons: list[DropReason | None] = [*vocabulary.reasons]
    reasons += ["no_entry"] * (source.num_rows - len(reasons))
    if keep_special:
        reasons = [reason if reason == "no_entry" else None for reason in reasons]
    tokens = tuple(
        token
        for token, reason in zip(vocabulary.tokens, reasons)
        if reason is None and token is not None
    )
    if len(tokens) < 2:
        raise DataError(
            f"Only {len(tokens)} of {source.num_rows} rows of {source.tensor} have a meaningful token.",
            remedy="Check the vocabulary, or set keep_special=true.",
        )
    kept = torch.tensor([reason is None for reason in reasons])
    return (
        kept,
        tokens,
        dict(Counter(reason for reason in reasons if reason is not None).most_common()),
    )
