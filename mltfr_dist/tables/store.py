"""Token tables on disk: a folder that holds all it needs, and proof that it is what it was.

``NAME/table.safetensors`` holds one tensor ``token_table`` [V_m, D_m] float32,
``NAME/vocabulary.json`` the tokens in row order, ``NAME/table.json`` the :class:`TableInfo`: sizes,
hashes, provenance.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from mltfr_dist.config import TableContent
from mltfr_dist.errors import DataError
from mltfr_dist.files import file_sha256
from mltfr_dist.progress import follow, say
from mltfr_dist.tables.info import (
    INFO_FILE,
    PROOF,
    REBUILD,
    TABLE_FILE,
    VOCABULARY_FILE,
    TableInfo,
    read_info,
    sealed,
    vocabulary_json,
)
from mltfr_dist.tables.partial import partial_folder
from mltfr_dist.tables.row_file import TENSOR_NAME, RowFile, header, read_into, writing

Log = Callable[[str], None]


@dataclass(frozen=True)
class TokenTable:
    """A stored token table.

    Attributes:
        name: the table's name.
        rows: [V_m, D_m] float32, backed by the file: processes of one machine that load the same
            table share its memory as long as they only read it (the mapping is private, so a write
            would copy the page).
        info: sizes, hashes, provenance.
        folder: where it is stored.
        sha256: what a run records: the file's, or for a control table its recipe's.
        row_ids: numbers of the stored rows that these are; None: all of them, in order.
        content: whether the rows are the stored ones or a control made from them
            (tables/content.py).
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
    """sha256 of the rows' float32 bytes, row by row: equal before and after training proves that a
    table was not touched.
    """
    digest = hashlib.sha256()
    for block in torch.split(rows.detach(), 4096):  # [n, D_m]
        digest.update(block.to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()


@dataclass(frozen=True)
class NewTable:
    """A table that is being written.

    Attributes:
        rows: its rows, to be filled.
        folder: where it lies meanwhile. output: the folder of tables that it will lie in.
        log: receives lines of text.
    """

    rows: RowFile
    folder: Path
    output: Path
    log: Log

    def finish(self, vocabulary: Sequence[str], **described: Any) -> TableInfo:
        """Write the tokens and the description, and give the folder its name.

        Args:
            vocabulary: the token of each row.
            **described: the other fields of :class:`TableInfo`, ``name`` among them.

        Raises:
            DataError: the name is taken by a different table, or the disk is full.
        """
        whole, rows = hashlib.sha256(header(self.rows.num_rows, self.rows.dim)), hashlib.sha256()
        for _, block in follow(self.rows.blocks(), "hashing", self.rows.num_rows, self.log):
            data = block.numpy().data
            whole.update(data)
            rows.update(data)
        with writing(self.output):
            (self.folder / VOCABULARY_FILE).write_bytes(vocabulary_json(vocabulary))
            info = sealed(
                TableInfo(
                    num_rows=self.rows.num_rows,
                    dim=self.rows.dim,
                    table_sha256=whole.hexdigest(),
                    rows_sha256=rows.hexdigest(),
                    vocabulary_sha256=file_sha256(self.folder / VOCABULARY_FILE),
                    **described,
                )
            )
            (self.folder / INFO_FILE).write_text(
                info.model_dump_json(indent=2) + "\n", encoding="utf-8"
            )
            for file in self.folder.iterdir():
                with file.open("rb") as written:
                    os.fsync(written.fileno())
            _publish(self.folder, self.output / info.name, info)
        return info


@contextmanager
def new_table(
    output: Path, name: str, num_rows: int, dim: int, log: Log = say
) -> Iterator[NewTable]:
    """A table to be filled and finished; what is not finished leaves nothing behind.

    Raises:
        DataError: ``output`` cannot be written.
    """
    with (
        partial_folder(output, name, log) as folder,
        RowFile(folder / TABLE_FILE, num_rows, dim) as rows,
    ):
        yield NewTable(rows, folder, output, log)


def save_table(
    output: str | Path, rows: torch.Tensor, vocabulary: Sequence[str], **described: Any
) -> TableInfo:
    """Write a token table that lies in memory to ``output / name``: all of it or nothing.

    The same rows, tokens and description give the same bytes. An equal table that is there is kept.

    Args:
        output: folder of tables; made when missing.
        rows: [V_m, D_m] float32.
        vocabulary: the token of each row.
        **described: the other fields of :class:`TableInfo`, ``name`` among them.

    Raises:
        DataError: a different table of this name is there, or rows and vocabulary disagree.
    """
    output = Path(output)
    if len(vocabulary) != len(rows):
        raise DataError(
            f"{len(rows)} rows but {len(vocabulary)} tokens.", remedy="Give every row its token."
        )
    with new_table(output, described["name"], *rows.shape) as table:
        table.rows.write(0, rows)
        return table.finish(vocabulary, **described)


def check_free(folder: Path, described: Mapping[str, Any]) -> None:
    """Whether such a table may become ``folder``: nothing is there, or what may be the same.

    Args:
        folder: where the table is to lie.
        described: fields of :class:`TableInfo`, those that are known.

    Raises:
        DataError: a different table is there, or something that is no sound table.
    """
    if not (folder.exists() or folder.is_symlink()):
        return
    try:
        present = load_table(folder).info
    except DataError as error:
        raise DataError(
            f"{folder} exists and is no sound token table: {error.what}", remedy=REBUILD
        ) from None
    differing = [key for key, value in described.items() if getattr(present, key) != value]
    if differing:
        raise DataError(
            f"{folder} already holds a different table (differing: {', '.join(differing)}).",
            rule="A stored table never changes, since runs refer to it.",
            remedy="Build under another name with --name, or delete the folder.",
        )


def _publish(partial: Path, folder: Path, info: TableInfo) -> None:
    """Give the finished folder its name; one that an equal table has is fine."""
    if not folder.exists():
        try:
            partial.rename(folder)
            return
        except OSError:
            if not folder.exists():  # else another process was faster: compare with what it wrote
                raise
    check_free(folder, {key: value for key, value in dict(info).items() if key not in PROOF})


def load_table(folder: str | Path, *, verify: bool = True) -> TokenTable:
    """Open a table written by :func:`save_table`.

    Args:
        folder: the table's folder.
        verify: compare the files' hashes with the header (reads the whole file once) and check the
            vocabulary.

    Raises:
        DataError: missing, of another schema version, damaged, or not what its header says.
    """
    folder = Path(folder)
    info = read_info(folder)
    path = folder / TABLE_FILE
    if not path.is_file():
        raise DataError(f"The token table {folder} has no {TABLE_FILE}.", remedy=REBUILD)
    if verify and file_sha256(path) != info.table_sha256:
        raise DataError(
            f"{path} was changed after it was written: its sha256 is not the one in {INFO_FILE}.",
            remedy=REBUILD,
        )
    try:
        # Mapped from the file, not read into memory.
        with safe_open(path, framework="pt") as file:
            rows: torch.Tensor = file.get_tensor(TENSOR_NAME)  # [V_m, D_m]
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path} cannot be read: {error}.", remedy=REBUILD) from None
    if tuple(rows.shape) != (info.num_rows, info.dim) or rows.dtype != torch.float32:
        raise DataError(
            f"{path} holds {tuple(rows.shape)} {rows.dtype}, but {INFO_FILE} says "
            f"({info.num_rows}, {info.dim}) torch.float32.",
            remedy=REBUILD,
        )
    if verify:
        _read_vocabulary(folder, info)
    return TokenTable(info.name, rows, info, folder, info.table_sha256)


def read_rows(table: TokenTable, start: int, stop: int) -> torch.Tensor:
    """[stop - start, D_m] rows of a stored table in memory of their own.

    Only these are read, and not by way of the mapping, whose pages would count as well.

    Raises:
        DataError: the file was cut short after it was opened.
    """
    path, rows = table.folder / TABLE_FILE, torch.empty(stop - start, table.info.dim)
    try:
        with path.open("rb", buffering=0) as file:
            first = 8 + int.from_bytes(file.read(8), "little")
            file.seek(first + 4 * table.info.dim * start)
            read_into(file, rows)
    except EOFError as error:
        raise DataError(f"{path} was changed while it was used: {error}.", remedy=REBUILD) from None
    return rows


def _read_vocabulary(folder: Path, info: TableInfo) -> tuple[str, ...]:
    path = folder / VOCABULARY_FILE
    if not path.is_file():
        raise DataError(f"The token table {folder} has no {VOCABULARY_FILE}.", remedy=REBUILD)
    if file_sha256(path) != info.vocabulary_sha256:
        raise DataError(
            f"{path} was changed after it was written: its sha256 is not the one in {INFO_FILE}.",
            remedy=REBUILD,
        )
    tokens = json.loads(path.read_text(encoding="utf-8"))
    if len(tokens) != info.num_rows:
        raise DataError(
            f"{path} has {len(tokens)} tokens, but {INFO_FILE} says {info.num_rows} rows.",
            remedy=REBUILD,
        )
    return tuple(tokens)
