"""Shards that are bad: found before training, left out on all ranks alike, and their loss
counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mltfr_dist.data.shards.manifest import Manifest, all_shards
from mltfr_dist.data.shards.reader import read_shard
from mltfr_dist.data.shards.retry import RetryPolicy
from mltfr_dist.errors import DataError


def find_bad_shards(folder: Path, manifest: Manifest, retries: RetryPolicy) -> dict[str, str]:
    """Read every shard of every split through; file name to what is wrong with it."""
    bad = {}
    for shard in all_shards(manifest):
        try:
            read_shard(folder, shard, num_items=manifest.num_items, retries=retries)
        except DataError as error:
            bad[shard.file] = error.what
    return bad


def loss_report(folder: Path, manifest: Manifest, left_out: Mapping[str, str]) -> str:
    """What is lost with the shards ``left_out`` (file name to reason), a line each and a line a
    split.

    Raises:
        DataError: a split would be empty.
    """
    lines = [
        f"Left out on all ranks: {file}: {reason}" for file, reason in sorted(left_out.items())
    ]
    for name, split in manifest.splits.items():
        kept = split.without(left_out)
        if not kept.shards:
            raise DataError(
                f"No shard of split {name} in {folder} is whole: {'; '.join(left_out.values())}",
                rule="data.on_bad_shard=quarantine leaves out bad shards as long as some remain.",
                remedy="Copy the folder again, or run `mltfr prepare` into a new folder.",
            )
        sequences, items = (
            split.num_sequences - kept.num_sequences,
            split.num_items - kept.num_items,
        )
        if sequences:
            lines.append(
                f"  {name} loses {sequences:,} of {split.num_sequences:,} sequences "
                f"({sequences / split.num_sequences:.2%}) "
                f"and {items:,} of {split.num_items:,} items"
            )
    return "\n".join(lines)
