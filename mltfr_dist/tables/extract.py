"""Finds a language model's input-embedding table and vocabulary; reads nothing else of it.

Memory: blocks of a few megabytes, however large the table is, and the tokens.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from mltfr_dist.config import TableConfig
from mltfr_dist.errors import DataError
from mltfr_dist.tables import hub
from mltfr_dist.tables.checkpoints import EmbeddingSource, open_embedding
from mltfr_dist.tables.vocabulary import DropReason, Vocabulary, read_vocabulary

LEAST_ROWS_PER_ID = 0.5
"""Share of a vocabulary's ids that must have a row: below, it is most likely another model's."""


@dataclass(frozen=True)
class OpenTable:
    """A table that was found and not yet read: which rows stay, and what they are called.

    Attributes:
        source: where the rows come from.
        kept: [rows in the source] bool, which rows stay.
        vocabulary: the token of each kept row.
        dropped: rows dropped by reason, most frequent first (``no_row``:
            tokens without one).
        source_name: default name of the table, from the source's own name.
        revision: commit of a checkpoint from the hub, else None.
        vocabulary_file: name of the file that the tokens come from.
        vocabulary_kind: which kind of tokenizer it is of.
    """

    source: EmbeddingSource
    kept: torch.Tensor
    vocabulary: tuple[str, ...]
    dropped: dict[DropReason, int]
    source_name: str
    revision: str | None
    vocabulary_file: str
    vocabulary_kind: str

    def blocks(self, digest: hashlib._Hash) -> Iterator[tuple[int, torch.Tensor]]:
        """The kept rows in order, as (first row of the block in the source, rows [n, D_m]).

        Args:
            digest: is fed the tensor's bytes as stored, those of dropped rows included.

        Raises:
            DataError: at the end, if numbers are infinite or NaN.
        """
        done, num_bad, first = 0, 0, ""
        for start, block in self.source.blocks(digest):
            indices = self.kept[start : start + len(block)].nonzero()[:, 0]  # [n]
            rows = block[indices]
            bad = (~rows.abs().amax(dim=1).isfinite()).nonzero()[:, 0]
            if len(bad) and not first:
                index = int(bad[0])
                token = self.vocabulary[done + index]
                first = f"row {start + int(indices[index])} (token {token!r})"
            num_bad += len(bad)
            done += len(rows)
            yield start, rows
        if num_bad:
            rows_text = f"{num_bad:,} rows, the first of them" if num_bad > 1 else "one row,"
            raise DataError(
                f"{self.source.tensor} of {', '.join(self.source.files)} holds infinite "
                f"values or NaN in {rows_text} {first}.",
                rule="Every number of a kept row must be finite in float32.",
                remedy="Fetch the checkpoint again, or ask those who made it.",
            )


@dataclass(frozen=True)
class ExtractedTable(OpenTable):
    """A table read into memory, not normalised.

    Attributes:
        rows: [V_m, D_m] float32, as stored in the checkpoint, less those dropped.
        source_sha256: of the tensor's bytes as stored, dropped rows included.
    """

    rows: torch.Tensor
    source_sha256: str


def open_table(source: str, config: TableConfig) -> OpenTable:
    """Find the embedding table of ``source`` and its tokens.

    Args:
        source: a weight file, a checkpoint folder, or a hub id (``owner/name`` or
            ``owner/name@revision``), of which only the weight file with the table is fetched.
        config: which tensor and vocabulary, and whether special tokens stay.

    Raises:
        DataError: no certain embedding, no vocabulary, or the two disagree.
    """
    path, revision = Path(source), None
    # Not resolved: a link is called by its own name, and `..` still has one.
    absolute = Path(os.path.abspath(path))  # noqa: PTH100
    name = absolute.stem if absolute.is_file() else absolute.name
    if not path.exists() and (hub_id := hub.parse_hub_id(source)):
        name = hub_id[0].rpartition("/")[2]
        path, revision = hub.fetch(*hub_id, config.tensor)
    embedding = open_embedding(path, config.tensor)
    vocabulary = (
        read_vocabulary(config.vocabulary) if config.vocabulary else embedding.read_vocabulary()
    )
    kept, tokens, dropped = _choose_rows(embedding, vocabulary, keep_special=config.keep_special)
    return OpenTable(
        embedding, kept, tokens, dropped, name, revision, vocabulary.source, vocabulary.kind
    )


def extract_table(source: str, config: TableConfig) -> ExtractedTable:
    """Read the embedding table of ``source`` into memory; arguments and errors as of `open_table`.

    `mltfr tables` does not hold it in memory (tables/build.py).
    """
    source_table, digest = open_table(source, config), hashlib.sha256()
    rows = torch.cat([rows for _, rows in source_table.blocks(digest)])
    return ExtractedTable(**vars(source_table), rows=rows, source_sha256=digest.hexdigest())


def _choose_rows(
    source: EmbeddingSource, vocabulary: Vocabulary, *, keep_special: bool
) -> tuple[torch.Tensor, tuple[str, ...], dict[DropReason, int]]:
    """The kept rows as a mask [rows in the source], their tokens, and the dropped ones counted by
    reason.
    """
    num_rows = source.num_rows
    num_without = sum(token is not None for token in islice(vocabulary.tokens, num_rows, None))
    _check_sizes(source, vocabulary, num_without)
    reasons: list[DropReason | None] = [*islice(vocabulary.reasons, num_rows)]
    reasons += ["no_entry"] * (num_rows - len(reasons))
    if keep_special:
        reasons = [reason if reason == "no_entry" else None for reason in reasons]
    tokens = tuple(
        token
        for token, reason in zip(vocabulary.tokens, reasons)
        if reason is None and token is not None
    )
    if len(tokens) < 2:
        others = "" if keep_special else ", or keep special tokens with --keep-special"
        raise DataError(
            f"Only {len(tokens)} of {num_rows} rows of {source.tensor} have a meaningful token.",
            remedy=f"Check that {vocabulary.source} is this model's vocabulary{others}.",
        )
    counted = Counter(reason for reason in reasons if reason is not None)
    if num_without:
        counted["no_row"] = num_without
    kept = torch.tensor([reason is None for reason in reasons])
    return kept, tokens, dict(counted.most_common())


def _check_sizes(source: EmbeddingSource, vocabulary: Vocabulary, num_without: int) -> None:
    """Whether enough of the vocabulary's ids have a row; ``num_without`` do not."""
    num_ids = num_without + sum(
        token is not None for token in islice(vocabulary.tokens, source.num_rows)
    )
    if num_ids - num_without < LEAST_ROWS_PER_ID * num_ids:
        raise DataError(
            f"{source.tensor} has {source.num_rows} rows but the vocabulary in {vocabulary.source} "
            f"has {num_ids} ids, of which {num_without} have no row.",
            rule="At least half of its ids must have a row; it is most likely another model's.",
            remedy="Give the vocabulary of this very checkpoint with --vocabulary PATH, or the "
            "embedding's name with --tensor NAME.",
        )
