"""What a stored token table says of itself: `table.json`, with a hash of its own content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from mltfr_dist.config import TableConfig
from mltfr_dist.errors import DataError
from mltfr_dist.headers import parse_header
from mltfr_dist.schema import Count, Section, nearest_key

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
LONGEST_NAME = 100
"""Letters in a table's name: a folder's name must hold it and what is added while it is written."""

TABLE_FILE, VOCABULARY_FILE, INFO_FILE = "table.safetensors", "vocabulary.json", "table.json"
DEFAULT_OUTPUT = Path("data/tables")
"""Where `mltfr tables` stores what it makes."""

REBUILD = "Delete the folder and build it again with `mltfr tables`."


class TableInfo(Section):
    """What a stored token table is and where it comes from (``table.json``)."""

    schema_version: Literal[1, 2] = Field(
        2, description="Layout of the folder; 1 had no info_sha256."
    )
    name: str = Field(
        description="The table's name, also its folder's.",
        pattern=NAME_PATTERN,
        max_length=LONGEST_NAME,
    )
    num_rows: Count = Field(description="V_m, tokens.")
    dim: Count = Field(description="D_m, columns.")
    table_sha256: str = Field(description="Of the file table.safetensors.")
    rows_sha256: str = Field(
        description="Of the rows alone (see table_hash), as a training run reports it."
    )
    vocabulary_sha256: str = Field(description="Of the file vocabulary.json.")
    source_files: tuple[str, ...] = Field(description="Names of the files that the rows come from.")
    source_sha256: str = Field(description="Of the source tensor's bytes as stored there.")
    source_revision: str | None = Field(None, description="Commit of a checkpoint from the hub.")
    tensor: str = Field(description="The source tensor's name.")
    source_dtype: str = Field(description="Number format in the source.")
    source_rows: Count = Field(description="Rows in the source.")
    vocabulary_file: str = Field(description="Name of the file that the tokens come from.")
    licence: str | None = Field(description="As the source states it; null when it does not.")
    dropped: dict[str, int] = Field(
        description="Rows of the source (no_row: tokens without one) that were dropped, by reason."
    )
    mean_cosine_before: float = Field(
        description="Mean cosine over pairs of kept rows, as extracted."
    )
    mean_cosine_after: float = Field(description="The same after normalisation.")
    config: TableConfig = Field(
        description="The configuration it was built with (vocabulary: the file's name only)."
    )
    info_sha256: str | None = Field(
        None, description="Of the other fields, as JSON with sorted keys and no blanks."
    )


PROOF = ("schema_version", "info_sha256")
"""Fields that belong to the file and not to the table."""


def info_hash(content: dict[str, Any]) -> str:
    """sha256 of the content of a ``table.json``, its own field ``info_sha256`` left out."""
    others = {key: value for key, value in content.items() if key != "info_sha256"}
    text = json.dumps(others, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sealed(info: TableInfo) -> TableInfo:
    """``info`` with the hash of its other fields."""
    return info.model_copy(update={"info_sha256": info_hash(json.loads(info.model_dump_json()))})


def vocabulary_json(vocabulary: Sequence[str]) -> bytes:
    """The content of ``vocabulary.json``.

    Raises:
        DataError: a token is no text that can be stored (half of a surrogate pair).
    """
    try:
        return json.dumps(list(vocabulary), ensure_ascii=False, indent=0).encode()
    except UnicodeEncodeError:
        row = next(i for i, token in enumerate(vocabulary) if _is_broken(token))
        raise DataError(
            f"The token of row {row}, {vocabulary[row]!r}, is no valid text.",
            remedy="Fetch the tokenizer's file again.",
        ) from None


def _is_broken(token: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in token)


def read_info(folder: Path) -> TableInfo:
    """The ``table.json`` of a stored table.

    Raises:
        DataError: it is missing, of another schema version, malformed, or not what was written.
    """
    path = folder / INFO_FILE
    if not path.is_file():
        raise DataError(
            f"{folder} is no token table: it has no {INFO_FILE}.",
            remedy=near_tables(folder) or "Build it with `mltfr tables`.",
        )
    try:
        info, content = parse_header(
            path.read_bytes(), TableInfo, (1, 2), what=path, remedy=REBUILD, error=DataError
        )
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is malformed: {error}.", remedy=REBUILD) from None
    if (info.info_sha256 is not None or info.schema_version == 2) and info.info_sha256 != info_hash(
        content
    ):
        raise DataError(
            f"{path} was changed after it was written: it does not have the hash that it names.",
            remedy=REBUILD,
        )
    return info


def near_tables(folder: Path) -> str | None:
    """Where the table that was meant may lie: by name alone, or misspelt; None: unknown."""
    for parent in dict.fromkeys((folder.parent, DEFAULT_OUTPUT)):
        names = sorted(file.parent.name for file in parent.glob(f"*/{INFO_FILE}"))
        if parent != folder.parent and folder.name in names:
            return f"Did you mean {parent / folder.name}?"
        if near := nearest_key(folder.name, names):
            return f"The tables in {parent} are {', '.join(names)}; did you mean {parent / near}?"
    return None
