"""`mltfr inspect TABLE`: what a stored token table holds.

Shapes: V rows, D columns, W rows of the word.
"""

from __future__ import annotations

import difflib
from pathlib import Path

import torch

from mltfr_dist.errors import DataError
from mltfr_dist.tables.geometry import nearest
from mltfr_dist.tables.row_file import BLOCK_ENTRIES
from mltfr_dist.tables.store import TokenTable, load_table

NUM_SAMPLES, NUM_NEIGHBOURS, NUM_NEAR = 12, 10, 8


def inspect_table(folder: str | Path, word: str | None = None) -> str:
    """The table as text; with ``word``, the tokens nearest to each of its spellings.

    Raises:
        DataError: the table is missing or damaged, or the word is none of its tokens.
    """
    folder = Path(folder)
    table = load_table(folder)
    rows = [] if word is None else rows_of_word(table, word)
    lines = [str(folder), *(f"  {name:<14}{value}" for name, value in facts(table)), ""]
    if not rows:
        step = max(1, len(table.rows) // NUM_SAMPLES)
        lines.append("  some of its tokens, with the length of their rows")
        lines += [
            f"  {float(table.rows[row].norm()):>10.3f}  {table.vocabulary[row]!r}"
            for row in range(step // 2, len(table.rows), step)
        ][:NUM_SAMPLES]
        return "\n".join(lines)
    count = min(NUM_NEIGHBOURS, len(table.rows) - 1)
    for row, cosines, indices in zip(rows, *nearest(table.rows, rows, count), strict=True):
        lines.append(f"  nearest to {table.vocabulary[row]!r} (row {row:,}), by cosine")
        lines += [
            f"  {float(cosine):>10.3f}  {table.vocabulary[int(index)]!r}"
            for cosine, index in zip(cosines, indices, strict=True)
        ]
    return "\n".join(lines)


def facts(table: TokenTable) -> list[tuple[str, str]]:
    """Name and value of what the table and its `table.json` say."""
    info = table.info
    size = 4 * info.num_rows * info.dim
    dropped = ", ".join(f"{count:,} {reason}" for reason, count in info.dropped.items()) or "none"
    low, middle, high = row_norms(table.rows)
    revision = f", revision {info.source_revision}" if info.source_revision else ""
    return [
        ("rows", f"{info.num_rows:,} of {info.dim} columns, float32, {size / 1e6:,.1f} MB"),
        ("source", f"{', '.join(info.source_files)}{revision}"),
        ("tensor", f"{info.tensor} [{info.source_rows:,}, {info.dim}] {info.source_dtype}"),
        ("tokens", info.vocabulary_file),
        ("licence", info.licence or "not stated"),
        ("dropped", dropped),
        ("normalised", info.config.normalise),
        (
            "mean cosine",
            f"of two rows {info.mean_cosine_before:.4f} before, {info.mean_cosine_after:.4f} after",
        ),
        ("row length", f"{low:.3f} at least, {middle:.3f} in the middle, {high:.3f} at most"),
        ("table sha256", info.table_sha256),
        ("source sha256", info.source_sha256),
    ]


def row_norms(rows: torch.Tensor) -> tuple[float, float, float]:
    """Smallest, median and largest length of the rows [V, D]."""
    norms = torch.cat([block.norm(dim=1) for block in _blocks(rows)])  # [V]
    return float(norms.min()), float(norms.median()), float(norms.max())


def rows_of_word(table: TokenTable, word: str) -> list[int]:
    """Rows whose token is ``word`` as it stands, or with a blank before or after it, in this order.

    Raises:
        DataError: there is none; tokens that are near are named.
    """
    bare = word.strip(" ")
    spellings = dict.fromkeys((word, f" {bare}", bare, f"{bare} "))
    rows = [row for one in spellings for row, token in enumerate(table.vocabulary) if token == one]
    if rows:
        return rows
    near = near_tokens(table.vocabulary, bare)
    raise DataError(
        f"No token of the table {table.name} is {word!r}.",
        rule="A word is looked up as it is written, with and without a blank before or after it.",
        remedy=f"Tokens that are near: {', '.join(map(repr, near))}."
        if near
        else "Look at some of its tokens with `mltfr inspect`, without --neighbours.",
    )


def near_tokens(vocabulary: tuple[str, ...], word: str) -> list[str]:
    """Tokens like ``word``: of other case first, then by letters in common."""
    folded = word.casefold()
    candidates: dict[str, list[str]] = {}
    for token in vocabulary:
        key = token.strip().casefold()
        if folded and key[:1] == folded[:1]:  # the whole vocabulary would take seconds
            candidates.setdefault(key, []).append(token)
    near = difflib.get_close_matches(folded, list(candidates), NUM_NEAR, cutoff=0.5)
    keys = dict.fromkeys([*([folded] if folded in candidates else []), *near])
    return [token for key in keys for token in candidates[key]][:NUM_NEAR]


def _blocks(rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.split(rows, max(1, BLOCK_ENTRIES // rows.shape[1]))
