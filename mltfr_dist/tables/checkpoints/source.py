"""What every format of checkpoint is read into: one embedding tensor, in blocks of rows.

Shapes: V_m rows and D_m columns of the tensor as stored.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mltfr_dist.errors import DataError
from mltfr_dist.files import unique_keys
from mltfr_dist.tables.vocabulary import Vocabulary

BLOCK_BYTES = 1 << 20
"""Size of a block of rows in float32: small beside any table, large enough to read fast."""

_POINTER = b"version https://git-lfs.github.com/spec/"
_CARD_BYTES = 1 << 16
_SETTINGS_BYTES = 1 << 24
"""Bounds of what is read of a model card and of a configuration."""


@dataclass(frozen=True)
class EmbeddingSource:
    """One tensor of a checkpoint, not yet read.

    Attributes:
        files: names of the files that the table comes from.
        tensor: the tensor's name; ``chosen_by`` says how it was found.
        num_rows: V_m as stored. dim: D_m.
        dtype: the stored number format, and the scales that are applied.
        licence: as the checkpoint states it, or None.
        read_vocabulary: reads the checkpoint's own vocabulary.
        read_rows: (start, stop) to the stored bytes and the rows [stop - start, D_m] in float32.
    """

    files: tuple[str, ...]
    tensor: str
    chosen_by: str
    num_rows: int
    dim: int
    dtype: str
    licence: str | None
    read_vocabulary: Callable[[], Vocabulary]
    read_rows: Callable[[int, int], tuple[bytes | memoryview, torch.Tensor]]

    def blocks(self, digest: hashlib._Hash | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """All rows in order as (index of the first row, rows [n, D_m] float32).

        ``digest`` is fed the stored bytes.
        """
        step = max(1, BLOCK_BYTES // (4 * self.dim))
        for start in range(0, self.num_rows, step):
            raw, rows = self.read_rows(start, min(start + step, self.num_rows))
            if digest is not None:
                digest.update(raw)
            yield start, rows


def refuse_pointer(file: Path) -> None:
    """Raise DataError if ``file`` is the few lines that git-lfs leaves in a file's place."""
    with file.open("rb") as opened:
        if opened.read(len(_POINTER)) == _POINTER:
            raise DataError(
                f"{file} is a git-lfs pointer, not the file itself.",
                remedy="Run `git lfs pull` in its repository.",
            )


def read_json(file: Path, *, unique: bool = False) -> Any:
    """The content of a small JSON file of a checkpoint.

    Args:
        file: its path.
        unique: refuse an object that has a key twice, of which one would be lost.

    Raises:
        DataError: it is no JSON, too deeply nested or over 16 MiB.
    """
    refuse_pointer(file)
    try:
        if file.stat().st_size > _SETTINGS_BYTES:
            raise ValueError("it is over 16 MiB")
        text = file.read_text(encoding="utf-8")
        return json.loads(text, object_pairs_hook=unique_keys if unique else None)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{file} is malformed: {error}.", remedy="Fetch it again; it is damaged."
        ) from None


def read_settings(folder: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint's folder; empty where there is none.

    Raises:
        DataError: it is malformed.
    """
    file = folder / "config.json"
    content = read_json(file) if file.is_file() else {}
    if not isinstance(content, dict):
        raise DataError(f"{file} is no JSON object.", remedy="Fetch it again; it is damaged.")
    return content


def licence_of(folder: Path) -> str | None:
    """The ``license:`` entry at the head of a model card (README.md), or None."""
    card = folder / "README.md"
    if not card.is_file():
        return None
    with card.open("rb") as opened:
        text = opened.read(_CARD_BYTES).decode("utf-8", errors="replace").replace("\r\n", "\n")
    head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    entry = re.search(r"^license:\s*(\S+)\s*$", head[1], re.MULTILINE) if head else None
    return entry[1].strip("'\"") if entry else None


def listing(tensors: Sequence[tuple[str, Sequence[int]]]) -> str:
    """The two-dimensional ones of (name, shape), most rows first, for a message."""
    flat = sorted(((*shape, name) for name, shape in tensors if len(shape) == 2), reverse=True)
    shown = [f"{name} [{rows}, {columns}]" for rows, columns, name in flat[:12]]
    more = f" and {len(flat) - 12} more" if len(flat) > 12 else ""
    return (", ".join(shown) or "none") + more
