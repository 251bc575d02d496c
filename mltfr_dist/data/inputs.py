"""What paths, folders and archives have become before any row is read: plain files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class InputFile:
    """A plain file to read rows from.

    Attributes:
        path: plain, seekable, uncompressed file that DuckDB or Python can read.
        name: what the user calls it, for messages: `logs/a.csv.gz`, `set.zip: ratings.csv`.
        ending: lower case, without compression: `.csv`.
    """

    path: Path
    name: str
    ending: str
