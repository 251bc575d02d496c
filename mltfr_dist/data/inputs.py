"""What paths, folders and archives have become before any row is read: plain files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class InputFile:
    """A plain file to read rows from.

    Attributes:
        path: plain, seekable, uncompressed file that DuckDB or Python can read.
        name: what the user calls it, for messages: `logs/a.csv.gz`, `set.zip: ratings.csv`.
        ending: lower case, without compression: `.csv`.
        partitions: columns that folder names give, the same value in each row.
    """

    path: Path
    name: str
    ending: str
    partitions: Mapping[str, str] = field(default_factory=dict)
