"""`manifest.json`: what a prepared folder holds, with the size and hash of every file."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from mltfr_dist.config import PrepareConfig
from mltfr_dist.errors import DataError
from mltfr_dist.files import file_sha256
from mltfr_dist.schema import Count, Section

SCHEMA_VERSION = 2
READABLE_VERSIONS = (1, SCHEMA_VERSION)
MANIFEST_NAME = "manifest.json"
PlainName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")]
"""A file name without any folder, so that a manifest never points outside its own folder."""
_REMEDY = "Copy the folder again, or run `mltfr prepare` into a new folder."


class ShardInfo(Section):
    """One tar file."""

    file: PlainName
    num_sequences: Count
    num_blocks: Count
    num_items: Count = Field(description="Items of all its sequences together.")
    bytes: Count
    sha256: str
    lengths: tuple[tuple[int, int], ...] | None = Field(
        None,
        description="(items, number of sequences with as many), ascending. Manifests of version 1 have none.",
    )


class SplitInfo(Section):
    """One split: its shards and their sums."""

    num_sequences: int
    num_items: int = Field(description="Items of all its sequences together, targets included.")
    max_length: int = Field(description="Items of its longest sequence.")
    shards: tuple[ShardInfo, ...]

    @model_validator(mode="after")
    def _adds_up(self) -> SplitInfo:
        for name in ("num_sequences", "num_items"):
            total = sum(getattr(shard, name) for shard in self.shards)
            if total != getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}, but its shards have {total}")
        for name in ("file", "sha256"):  # the same content twice would give its sequences twice
            values = [getattr(shard, name) for shard in self.shards]
            if len(set(values)) < len(values):
                raise ValueError(
                    f"two shards have the same {name}, {max(values, key=values.count)}"
                )
        return self

    def without(self, files: Collection[str]) -> SplitInfo:
        """The split without some of its shards."""
        kept = tuple(shard for shard in self.shards if shard.file not in files)
        sums = {
            name: sum(getattr(shard, name) for shard in kept)
            for name in ("num_sequences", "num_items")
        }
        return SplitInfo(**sums, max_length=self.max_length, shards=kept)


class SourceInfo(Section):
    """What the data was prepared from. File names only: a manifest is the same wherever it was made."""

    file: str
    bytes: int
    sha256: str
    titles_file: str | None = None
    titles_sha256: str | None = None


class CoreRound(Section):
    """One round of the k-core."""

    users_removed: int
    items_removed: int
    interactions_left: int


class PrepareReport(Section):
    """What preparation kept, dropped and met."""

    rows_read: int
    duplicates_dropped: int
    core_rounds: tuple[CoreRound, ...]
    ties: int = Field(
        description="Interactions at the same time as the user's one before; they keep file order."
    )
    train_only_users: int = Field(
        description="leave_one_out: users with fewer than 3 interactions."
    )
    short_train_sequences: int = Field(
        description="Users whose training part has one item and is not stored."
    )
    cold_targets: dict[str, int] = Field(
        description="Targets of valid and test that no stored training sequence holds."
    )
    cut_times: tuple[str, str] | None = Field(
        None, description="global_temporal: start of validation and of test."
    )
    items_with_title: int = 0
    times: tuple[str, str] | None = Field(
        None, description="Earliest and latest kept; None for sequence text."
    )


SPLITS = ("train", "valid", "test")


class Manifest(Section):
    """`manifest.json`: everything about a prepared folder."""

    schema_version: int = SCHEMA_VERSION
    num_users: int
    num_items: int = Field(description="Item ids are 1..num_items; 0 is padding.")
    num_interactions: int
    splits: dict[str, SplitInfo] = Field(description="train, valid and test.")
    source: SourceInfo
    prepare: PrepareConfig
    report: PrepareReport
    files: dict[PlainName, str] = Field(description="sha256 of items.parquet and users.parquet.")

    @field_validator("splits")
    @classmethod
    def _all_splits(cls, splits: dict[str, SplitInfo]) -> dict[str, SplitInfo]:
        if set(splits) != set(SPLITS):
            raise ValueError(f"must be exactly {', '.join(SPLITS)}, not {', '.join(splits)}")
        return splits


def load_manifest(folder: Path, *, left_out: Collection[str] = ()) -> Manifest:
    """:func:`read_manifest`, and a look whether every file it lists is there, shards with their size (a fast check).

    Args:
        folder: the prepared folder.
        left_out: shard files that count as if they had never been written.

    Raises:
        DataError: as read_manifest, a file missing or of another size, or shards left out that there are not.
    """
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
    for name in manifest.files:
        if not (folder / name).is_file():
            raise DataError(
                f"{folder / name} is missing, though the manifest lists it.", remedy=_REMEDY
            )
    for shard in all_shards(manifest):
        check_size(folder / shard.file, shard)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read `manifest.json` and look at nothing else.

    Raises:
        DataError: there is none, it is malformed, or of another schema version.
    """
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
        DataError: it is malformed, or of another schema version.
    """
    try:
        values = _json_object(content)
        version = values.get("schema_version")
        if version not in READABLE_VERSIONS:
            raise DataError(
                f"{path} has schema version {version}; this program reads versions {' and '.join(map(str, READABLE_VERSIONS))}.",
                remedy="Run `mltfr prepare` again with this version, into a new folder.",
            )
        return Manifest.model_validate(values)
    except ValueError as error:  # also of JSON, of UTF-8 and of pydantic
        reason = error.errors()[0] if isinstance(error, ValidationError) else str(error)
        if isinstance(reason, dict):
            reason = f"`{'.'.join(map(str, reason['loc']))}`: {reason['msg']}"
        raise DataError(f"{path} is malformed: {reason}.", remedy=_REMEDY) from None


def verify_folder(folder: Path, *, left_out: Collection[str] = ()) -> Manifest:
    """:func:`load_manifest`, and every listed file read through and compared with its sha256.

    Raises:
        DataError: as load_manifest, and for a file whose content has changed.
    """
    manifest = load_manifest(folder, left_out=left_out)
    hashes = manifest.files | {shard.file: shard.sha256 for shard in all_shards(manifest)}
    for name, expected in hashes.items():
        check_hash(folder / name, file_sha256(folder / name), expected)
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


def check_hash(path: Path, found: str, expected: str) -> None:
    """Refuse a file whose sha256 is not the expected one."""
    if found != expected:
        raise damaged(path, f"its sha256 begins {found[:12]}, the manifest says {expected[:12]}")


def damaged(path: Path, reason: str) -> DataError:
    """The error for a file that is not what was written."""
    return DataError(
        f"{path} is damaged: {reason}.",
        rule="A file must be exactly what `mltfr prepare` wrote.",
        remedy=_REMEDY,
    )


def _json_object(content: bytes) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ValueError: it is not JSON, or not an object.
    """
    values = json.loads(content)
    if not isinstance(values, dict):
        raise ValueError("not a JSON object")
    return values
