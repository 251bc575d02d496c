"""Token tables on disk: a folder that holds all it needs, and proof that it is what it was.

``NAME/table.safetensors`` holds one tensor ``token_table`` [V_m, D_m] float32, ``NAME/vocabulary.json`` the tokens in
row order, ``NAME/table.json`` the :class:`TableInfo`: sizes, hashes, provenance.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mltfr_dist.config import TableConfig, TableContent
from mltfr_dist.errors import DataError
from mltfr_dist.files import file_sha256
from mltfr_dist.schema import Count, Section

SCHEMA_VERSION = 1
TENSOR_NAME = "token_table"
TABLE_FILE, VOCABULARY_FILE, INFO_FILE = "table.safetensors", "vocabulary.json", "table.json"
_REBUILD = "Delete the folder and build it again with `mltfr tables`."


class TableInfo(Section):
    """What a stored token table is and where it comes from (``table.json``)."""

    schema_version: Literal[1] = Field(1, description="Layout of the folder.")
    name: str = Field(
        description="The table's name, also its folder's.", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
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
    dropped: dict[str, int] = Field(description="Rows of the source that were dropped, by reason.")
    mean_cosine_before: float = Field(
        description="Mean cosine over pairs of kept rows, as extracted."
    )
    mean_cosine_after: float = Field(description="The same after normalisation.")
    config: TableConfig = Field(
        description="The configuration it was built with (vocabulary: the file's name only)."
    )


@dataclass(frozen=True)
class TokenTable:
    """A stored token table.

    Attributes:
        name: the table's name.
        rows: [V_m, D_m] float32, backed by the file: processes of one machine that load the same table share its
            memory as long as they only read it (the mapping is private, so a write would copy the page).
        info: sizes, hashes, provenance.
        folder: where it is stored.
        sha256: what a run records: the file's, or for a control table its recipe's.
        row_ids: numbers of the stored rows that these are; None: all of them, in order.
        content: whether the rows are the stored ones or a control made from them (tables/content.py).
    """

    name: str
    rows: torch.Tensor
    info: TableInfo
    folder: Path
    sha256: str
    content: TableContent = "real"
    row_ids: tuple[int, ...] | None = None

    @cached_property
    def vocabulary(self) -> tuple[str, ...]:
        """The token of each stored row; read when first asked for."""
        return _read_vocabulary(self.folder, self.info)

    def token(self, row: int) -> str:
        """What to call a row: its token, or its number where the row is not that token's."""
        row = row if self.row_ids is None else self.row_ids[row]
        return self.vocabulary[row] if self.content == "real" else f"row {row}"


def table_hash(rows: torch.Tensor) -> str:
    """sha256 of the rows' float32 bytes, row by row: equal before and after training proves that a table was not touched."""
    digest = hashlib.sha256()
    for block in torch.split(rows.detach(), 4096):  # [n, D_m]
        digest.update(block.to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()


def save_table(
    output: Path, rows: torch.Tensor, vocabulary: Sequence[str], **described: Any
) -> TableInfo:
    """Write a token table to ``output / name``: all of it or nothing.

    The same rows, tokens and description give the same bytes. An equal table that is already there is kept.

    Args:
        output: folder of tables; made when missing.
        rows: [V_m, D_m] float32, contiguous.
        vocabulary: the token of each row.
        **described: the other fields of :class:`TableInfo`, ``name`` among them.

    Raises:
        DataError: a different table of this name is there, or rows and vocabulary disagree.
    """
    if len(vocabulary) != len(rows):
        raise DataError(
            f"{len(rows)} rows but {len(vocabulary)} tokens.", remedy="Give every row its token."
        )
    output.mkdir(parents=True, exist_ok=True)
    partial = output / f".{described['name']}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        save_file({TENSOR_NAME: rows}, partial / TABLE_FILE)
        (partial / VOCABULARY_FILE).write_text(
            json.dumps(list(vocabulary), ensure_ascii=False, indent=0), encoding="utf-8"
        )
        info = TableInfo(
            num_rows=rows.shape[0],
            dim=rows.shape[1],
            table_sha256=file_sha256(partial / TABLE_FILE),
            rows_sha256=table_hash(rows),
            vocabulary_sha256=file_sha256(partial / VOCABULARY_FILE),
            **described,
        )
        (partial / INFO_FILE).write_text(info.model_dump_json(indent=2) + "\n", encoding="utf-8")
        # safetensors writes for the owner alone; a table is as readable as any other file.
        (partial / TABLE_FILE).chmod((partial / VOCABULARY_FILE).stat().st_mode)
        for file in partial.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        _publish(partial, output / info.name, info)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return info


def _publish(partial: Path, folder: Path, info: TableInfo) -> None:
    """Give the finished folder its name, unless that name is taken: by the same table, fine; by another, an error."""
    if not folder.exists():
        try:
            partial.rename(folder)
            return
        except OSError:
            if not folder.exists():  # else another process was faster: compare with what it wrote
                raise
    try:
        present = load_table(folder).info
    except DataError as error:
        raise DataError(
            f"{folder} exists and is no sound token table: {error.what}", remedy=_REBUILD
        ) from None
    if present != info:
        differing = [
            key for key in TableInfo.model_fields if getattr(present, key) != getattr(info, key)
        ]
        raise DataError(
            f"{folder} already holds a different table (differing: {', '.join(differing)}).",
            rule="A stored table never changes, since runs refer to it.",
            remedy="Build under another name, or delete the folder.",
        )


def load_table(folder: Path, *, verify: bool = True) -> TokenTable:
    """Open a table written by :func:`save_table`.

    Args:
        folder: the table's folder.
        verify: compare the files' hashes with the header (reads the whole file once) and check the vocabulary.

    Raises:
        DataError: missing, of another schema version, damaged, or not what its header says.
    """
    info = _read_info(folder)
    path = folder / TABLE_FILE
    if not path.is_file():
        raise DataError(f"The token table {folder} has no {TABLE_FILE}.", remedy=_REBUILD)
    if verify and file_sha256(path) != info.table_sha256:
        raise DataError(
            f"{path} was changed after it was written: its sha256 is not the one in {INFO_FILE}.",
            remedy=_REBUILD,
        )
    try:
        # Mapped from the file, not read into memory.
        with safe_open(path, framework="pt") as file:
            rows: torch.Tensor = file.get_tensor(TENSOR_NAME)  # [V_m, D_m]
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}.", remedy=_REBUILD) from None
    if tuple(rows.shape) != (info.num_rows, info.dim) or rows.dtype != torch.float32:
        raise DataError(
            f"{path} holds {tuple(rows.shape)} {rows.dtype}, but {INFO_FILE} says ({info.num_rows}, {info.dim}) torch.float32.",
            remedy=_REBUILD,
        )
    if verify:
        _read_vocabulary(folder, info)
    return TokenTable(info.name, rows, info, folder, info.table_sha256)


def read_rows(table: TokenTable, start: int, stop: int) -> torch.Tensor:
    """[stop - start, D_m] rows of a stored table in memory of their own; no others are read from disk."""
    with safe_open(table.folder / TABLE_FILE, framework="pt") as file:
        rows: torch.Tensor = file.get_slice(TENSOR_NAME)[start:stop].clone()
    return rows


def _read_info(folder: Path) -> TableInfo:
    path = folder / INFO_FILE
    if not path.is_file():
        raise DataError(
            f"{folder} is no token table: it has no {INFO_FILE}.",
            remedy="Build it with `mltfr tables`.",
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.get("schema_version") if isinstance(content, dict) else None
        if version != SCHEMA_VERSION:
            raise DataError(
                f"{path} has schema version {version!r}; this program reads {SCHEMA_VERSION}.",
                remedy=_REBUILD,
            )
        return TableInfo.model_validate(content)
    except (ValidationError, ValueError) as error:
        raise DataError(f"{path} is malformed: {error}.", remedy=_REBUILD) from None


def _read_vocabulary(folder: Path, info: TableInfo) -> tuple[str, ...]:
    path = folder / VOCABULARY_FILE
    if not path.is_file():
        raise DataError(f"The token table {folder} has no {VOCABULARY_FILE}.", remedy=_REBUILD)
    if file_sha256(path) != info.vocabulary_sha256:
        raise DataError(
            f"{path} was changed after it was written: its sha256 is not the one in {INFO_FILE}.",
            remedy=_REBUILD,
        )
    tokens = json.loads(path.read_text(encoding="utf-8"))
    if len(tokens) != info.num_rows:
        raise DataError(
            f"{path} has {len(tokens)} tokens, but {INFO_FILE} says {info.num_rows} rows.",
            remedy=_REBUILD,
        )
    return tuple(tokens)
