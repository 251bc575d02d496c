"""What is refused before any row is read: names, places to write to, and what is there already."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mltfr_dist.config import TableConfig
from mltfr_dist.errors import ConfigError
from mltfr_dist.tables.extract import OpenTable, open_table
from mltfr_dist.tables.info import LONGEST_NAME, NAME_PATTERN, vocabulary_json
from mltfr_dist.tables.row_file import writing
from mltfr_dist.tables.store import check_free


@dataclass(frozen=True)
class Plan:
    """A table to be built: found and checked, its rows not yet read.

    Attributes:
        table: its source.
        output: folder of tables. name: its own name.
        described: fields of :class:`TableInfo` that are known so far.
        config: what was asked for.
    """

    table: OpenTable
    output: Path
    name: str
    described: dict[str, Any]
    config: TableConfig


def check_name(name: str | None) -> None:
    """Whether a table may be called ``name``.

    Raises:
        ConfigError: it may not.
    """
    if name is not None and (len(name) > LONGEST_NAME or not re.fullmatch(NAME_PATTERN, name)):
        raise ConfigError(
            f"--name {name!r} cannot be a table's name.",
            rule="It is a folder's name of letters, digits, dots, dashes and underscores, begins "
            f"with a letter or digit, and has {LONGEST_NAME} characters at most.",
            remedy=f"Use --name {_valid_name(name)}.",
        )


def check_output(output: Path) -> None:
    """Whether tables can be written to ``output``, as far as it can be known without writing.

    Raises:
        DataError: it is no folder, lies in none, or may not be written.
    """
    with writing(output):
        paths = (output.absolute(), *output.absolute().parents)
        present = next(path for path in paths if path.exists() or path.is_symlink())
        if not present.is_dir():
            raise NotADirectoryError(0, f"{present} is no folder")
        if not os.access(present, os.W_OK | os.X_OK):
            raise PermissionError(0, f"{present} may not be written")


def _valid_name(text: str) -> str:
    """The name nearest to ``text`` that a table may have."""
    name = re.sub(r"[^A-Za-z0-9._-]+|^[^A-Za-z0-9]+", "-", text).strip("-._")
    return name[:LONGEST_NAME].rstrip("-._") or "table"


def plan_table(
    source: str,
    output: Path,
    config: TableConfig,
    *,
    name: str | None = None,
    licence: str | None = None,
) -> Plan:
    """Find a table and compare it with what may already have its name.

    ``licence`` is for a source that states none.

    Raises:
        DataError: a source that cannot be read with certainty, or a different table of this name.
    """
    table = open_table(source, config)
    stored = table.source
    name = name or _valid_name(table.source_name)
    recorded = config.model_copy(
        update={"vocabulary": Path(config.vocabulary.name) if config.vocabulary else None}
    )
    described = {
        "name": name,
        "source_files": stored.files,
        "source_revision": table.revision,
        "tensor": stored.tensor,
        "source_dtype": stored.dtype,
        "source_rows": stored.num_rows,
        "vocabulary_file": table.vocabulary_file,
        "licence": licence or stored.licence,
        "dropped": dict(table.dropped),
        "config": recorded,
    }
    sizes = {
        "num_rows": len(table.vocabulary),
        "dim": stored.dim,
        "vocabulary_sha256": hashlib.sha256(vocabulary_json(table.vocabulary)).hexdigest(),
    }
    check_free(output / name, described | sizes)
    return Plan(table, output, name, described, config)
