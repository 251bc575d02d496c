"""What `manifest.json` holds, field by field, and the sums that must agree in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from typing import Annotated, Any

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from mltfr_dist.config import PrepareConfig
from mltfr_dist.schema import Count, Section

SCHEMA_VERSION = 3
SEVERAL_TARGETS_VERSION = 4
"""Of data whose users may have several targets, which earlier releases cannot read."""
READABLE_VERSIONS = (1, 2, SCHEMA_VERSION, SEVERAL_TARGETS_VERSION)
SPLITS = ("train", "valid", "test")
ITEMS_NAME, USERS_NAME = "items.parquet", "users.parquet"
PlainName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*$")]
"""A file name without any folder, so that a manifest never points outside its own folder."""
Number = Annotated[int, Field(ge=0)]


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
        description="(items, number of sequences with as many), ascending. Manifests of version 1 "
        "have none.",
    )
    num_targets: Count | None = Field(
        None,
        description="Targets of its users, one that comes again once; None: one a user.",
    )

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without ``num_targets`` where there is one a user, as earlier releases write it."""
        values: dict[str, Any] = handler(self)
        return {k: v for k, v in values.items() if (k, v) != ("num_targets", None)}

    def check_lengths(self) -> None:
        """Whether ``lengths``, where there are any, agree with the other numbers.

        Raises:
            ValueError: they do not.
        """
        if self.lengths is None:
            return
        sizes = [size for size, _ in self.lengths]
        if sizes != sorted(set(sizes)) or any(min(pair) < 1 for pair in self.lengths):
            raise ValueError(f"the lengths of {self.file} are not ascending, or not positive")
        sums = {
            "num_sequences": sum(count for _, count in self.lengths),
            "num_items": sum(size * count for size, count in self.lengths),
        }
        for name, total in sums.items():
            if total != getattr(self, name):
                raise ValueError(
                    f"{name} of {self.file} is {getattr(self, name)}, but its lengths give {total}"
                )


class SplitInfo(Section):
    """One split: its shards and their sums."""

    num_sequences: Number
    num_items: Number = Field(description="Items of all its sequences together, targets included.")
    max_length: Number = Field(description="Items of its longest sequence.")
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

    @property
    def num_targets(self) -> int:
        """Targets of all users; of a split that is ranked."""
        return sum(
            shard.num_sequences if shard.num_targets is None else shard.num_targets
            for shard in self.shards
        )

    def without(self, files: Collection[str]) -> SplitInfo:
        """The split without some of its shards."""
        kept = tuple(shard for shard in self.shards if shard.file not in files)
        sums = {
            name: sum(getattr(shard, name) for shard in kept)
            for name in ("num_sequences", "num_items")
        }
        return SplitInfo(**sums, max_length=self.max_length, shards=kept)


class SourceInfo(Section):
    """What the data was prepared from. File names only: a manifest is the same wherever it was
    made.
    """

    file: str
    bytes: Number
    sha256: str
    titles_file: str | None = None
    titles_sha256: str | None = None


class CoreRound(Section):
    """One round of the k-core."""

    users_removed: Number
    items_removed: Number
    interactions_left: Number


class PrepareReport(Section):
    """What preparation kept, dropped and met."""

    rows_read: Number
    duplicates_dropped: Number
    core_rounds: tuple[CoreRound, ...]
    ties: Number = Field(
        description="Interactions at the same time as the user's one before; they keep file order."
    )
    train_only_users: Number = Field(
        description="leave_one_out: users with fewer than 3 interactions."
    )
    short_train_sequences: Number = Field(
        description="Users whose training part has one item and is not stored."
    )
    cold_targets: dict[str, Number] = Field(
        description="Targets of valid and test that no stored training sequence holds."
    )
    cut_times: tuple[str, str] | None = Field(
        None, description="global_temporal: start of validation and of test."
    )
    items_with_title: Number = 0
    times: tuple[str, str] | None = Field(
        None, description="Earliest and latest kept; None for sequence text."
    )


class Manifest(Section):
    """`manifest.json`: everything about a prepared folder."""

    schema_version: int = SCHEMA_VERSION
    num_users: Count
    num_items: Count = Field(description="Item ids are 1..num_items; 0 is padding.")
    num_interactions: Count
    splits: dict[str, SplitInfo] = Field(description="train, valid and test.")
    source: SourceInfo
    prepare: PrepareConfig
    report: PrepareReport
    files: dict[PlainName, str] = Field(description="sha256 of items.parquet and users.parquet.")
    checksum: str | None = Field(
        None,
        description="sha256 of all the other fields (see `checksum_of`). "
        "Manifests of versions 1 and 2 have none.",
    )

    @field_validator("splits")
    @classmethod
    def _all_splits(cls, splits: dict[str, SplitInfo]) -> dict[str, SplitInfo]:
        if set(splits) != set(SPLITS):
            raise ValueError(f"must be exactly {', '.join(SPLITS)}, not {', '.join(splits)}")
        return splits

    @field_validator("files")
    @classmethod
    def _both_maps(cls, files: dict[str, str]) -> dict[str, str]:
        if set(files) != {ITEMS_NAME, USERS_NAME}:
            raise ValueError(f"must be exactly {ITEMS_NAME} and {USERS_NAME}")
        return files

    @model_validator(mode="after")
    def _adds_up(self) -> Manifest:
        for name, split in self.splits.items():
            if split.num_sequences > self.num_users:
                raise ValueError(
                    f"{name} has {split.num_sequences} sequences, of {self.num_users} users"
                )
            if split.num_items > self.num_interactions:
                raise ValueError(
                    f"{name} has {split.num_items} items, of {self.num_interactions} interactions"
                )
            for shard in split.shards:
                shard.check_lengths()
            longest = [shard.lengths[-1][0] for shard in split.shards if shard.lengths]
            if len(longest) == len(split.shards) and split.max_length != max(longest, default=0):
                raise ValueError(
                    f"max_length of {name} is {split.max_length}, but its shards' lengths give "
                    f"{max(longest, default=0)}"
                )
        return self

    def sealed(self) -> Manifest:
        """With its checksum."""
        values = self.model_dump(mode="json", exclude={"checksum"})
        return self.model_copy(update={"checksum": checksum_of(values)})


def checksum_of(values: dict[str, Any]) -> str:
    """sha256 of a manifest's values without `checksum`, as JSON with sorted keys and no blanks."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
