"""`manifest.json`: what a prepared folder holds, with the hash of every file and of itself."""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from mltfr_dist.data.shards.manifest_schema import (
    ITEMS_NAME,
    READABLE_VERSIONS,
    SCHEMA_VERSION,
    SEVERAL_TARGETS_VERSION,
    SPLITS,
    USERS_NAME,
    CoreRound,
    Manifest,
    PrepareReport,
    ShardInfo,
    SourceInfo,
    SplitInfo,
    checksum_of,
)
from mltfr_dist.errors import DataError
from mltfr_dist.files import content_sha256, file_sha256
from mltfr_dist.headers import parse_header

__all__ = [
    "ITEMS_NAME",
    "MANIFEST_NAME",
    "SCHEMA_VERSION",
    "SEVERAL_TARGETS_VERSION",
    "SPLITS",
    "USERS_NAME",
    "CoreRound",
    "Manifest",
    "PrepareReport",
    "ShardInfo",
    "SourceInfo",
    "SplitInfo",
    "all_shards",
    "check_hash",
    "check_size",
    "damaged",
    "load_manifest",
    "open_map",
    "parse_manifest",
    "read_manifest",
    "read_map",
    "verify_folder",
    "verify_maps",
]

MANIFEST_NAME = "manifest.json"
_REMEDY = (
    "Copy the folder again, or run `mltfr prepare` into a new folder: "
    "the same source and options give the same data."
)


def load_manifest(folder: str | Path, *, left_out: Collection[str] = ()) -> Manifest:
    """:func:`read_manifest`, and a fast look whether its files are there and as large as it says.

    Of shards that is the size in bytes, of the maps of users and items the number of rows.

    Args:
        folder: the prepared folder.
        left_out: shard files that count as if they had never been written.

    Raises:
        DataError: as read_manifest, a file missing or of another size, or shards left out that
            there are not.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    unknown = set(left_out) - {shard.file for shard in all_shards(manifest)}
    if unknown:
        raise DataError(
            f"{folder} has no shard {', '.join(sorted(unknown))} that could be left out.",
            remedy="Correct data.left_out.",
        )
    if left_out:
        splits = {name: split.without(left_out) for name, split in manifest.splits.items()}
        manifest = manifest.model_copy(update={"splits": splits})
    for name, rows in ((ITEMS_NAME, manifest.num_items), (USERS_NAME, manifest.num_users)):
        _check_rows(folder / name, rows)
    for shard in all_shards(manifest):
        check_size(folder / shard.file, shard)
    return manifest


def read_manifest(folder: str | Path) -> Manifest:
    """Read `manifest.json` and look at nothing else.

    Raises:
        DataError: there is none, it is malformed, or of another schema version.
    """
    folder = Path(folder)
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise DataError(
            f"{folder} holds no {MANIFEST_NAME}.",
            rule="It is the last thing that `mltfr prepare` writes.",
            remedy=_REMEDY,
        )
    return parse_manifest(path.read_bytes(), str(path))


def parse_manifest(content: bytes, path: str) -> Manifest:
    """The manifest that ``content`` is; ``path`` is its name in errors.

    Raises:
        DataError: it is malformed, of another schema version, or not what was written.
    """
    try:
        manifest, values = parse_header(
            content,
            Manifest,
            READABLE_VERSIONS,
            what=path,
            remedy="Run `mltfr prepare` again with this version, into a new folder.",
            error=DataError,
        )
    except (ValueError, RecursionError) as error:  # also of JSON, of UTF-8 and of pydantic
        reason = error.errors()[0] if isinstance(error, ValidationError) else str(error)
        if isinstance(reason, dict):
            reason = f"`{'.'.join(map(str, reason['loc']))}`: {reason['msg']}"
        raise DataError(f"{path} is malformed: {reason}.", remedy=_REMEDY) from None
    _check_checksum(values, path)
    return manifest


def _check_checksum(values: dict[str, Any], path: str) -> None:
    if "checksum" not in values and values["schema_version"] < 3:
        return
    actual = checksum_of({name: value for name, value in values.items() if name != "checksum"})
    if values.get("checksum") != actual:
        raise DataError(
            f"{path} is not what `mltfr prepare` wrote: the checksum of its values begins "
            f"{actual[:12]}, the one it holds {str(values.get('checksum'))[:12]}.",
            rule="A manifest is never edited: its numbers belong to the files beside it.",
            remedy=_REMEDY,
        )


def _check_rows(path: Path, expected: int) -> None:
    """Refuse a map that is missing or has other rows; reads the end of the file only."""
    if not path.is_file():
        raise DataError(f"{path} is missing, though the manifest lists it.", remedy=_REMEDY)
    try:
        rows = pq.read_metadata(path).num_rows
    except (pa.ArrowException, OSError) as error:
        raise damaged(path, str(error).splitlines()[0].rstrip(".")) from None
    if rows != expected:
        raise damaged(path, f"it has {rows:,} rows, the manifest says {expected:,}")


def open_map(folder: Path, manifest: Manifest, name: str) -> pq.ParquetFile:
    """`items.parquet` or `users.parquet`, hashed and compared, to be read by range: one file,
    opened once, which stays open as long as what is returned.

    Raises:
        DataError: it is missing, or not what was written.
    """
    path = folder / name
    try:
        file = pa.OSFile(str(path), "r")
        check_hash(path, content_sha256(file), manifest.files[name])
        return pq.ParquetFile(file)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise DataError(f"{path} cannot be read: {reason}.", remedy=_REMEDY) from None


def read_map(
    folder: Path, manifest: Manifest, name: str, columns: list[str] | None = None
) -> pa.Table:
    """:func:`open_map`, and all rows of some columns; None: of all."""
    with open_map(folder, manifest, name) as file:
        return file.read(columns)


def verify_maps(folder: Path, manifest: Manifest) -> None:
    """Compare `items.parquet` and `users.parquet` with their sha256.

    Raises:
        DataError: one is missing, or not what was written.
    """
    for name, expected in manifest.files.items():
        check_hash(folder / name, file_sha256(folder / name), expected)


def verify_folder(folder: str | Path, *, left_out: Collection[str] = ()) -> Manifest:
    """:func:`load_manifest`, and every listed file read through and compared with its sha256.

    Raises:
        DataError: as load_manifest, and for a file whose content has changed.
    """
    folder = Path(folder)
    manifest = load_manifest(folder, left_out=left_out)
    verify_maps(folder, manifest)
    for shard in all_shards(manifest):
        check_hash(folder / shard.file, file_sha256(folder / shard.file), shard.sha256)
    return manifest


def all_shards(manifest: Manifest) -> list[ShardInfo]:
    """The shards of every split."""
    return [shard for split in manifest.splits.values() for shard in split.shards]


def check_size(path: Path, info: ShardInfo) -> None:
    """Refuse a shard that is missing or of another size than its entry says."""
    if not path.is_file():
        raise DataError(
            f"The shard {path} is missing, though the manifest lists it.", remedy=_REMEDY
        )
    size = path.stat().st_size
    if size != info.bytes:
        raise damaged(path, f"it has {size:,} bytes, the manifest says {info.bytes:,}")


def check_hash(path: Path, actual: str, expected: str) -> None:
    """Refuse a file whose sha256 is not the expected one."""
    if actual != expected:
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(path.stat().st_mtime))
        raise damaged(
            path,
            f"its sha256 begins {actual[:12]}, the manifest says {expected[:12]} "
            f"(the file was last written on {written})",
        )


def damaged(path: Path, reason: str) -> DataError:
    """The error for a file that is not what was written."""
    return DataError(
        f"{path} is damaged: {reason}.",
        rule="A file must be exactly what `mltfr prepare` wrote.",
        remedy=_REMEDY,
    )
