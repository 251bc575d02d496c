"""Training parts of one item: too short to train on and so in no training shard.

They are interactions before the cut all the same: whoever counts what training holds counts them.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from mltfr_dist.data.shards.manifest import Manifest, check_hash, read_manifest
from mltfr_dist.data.shards.packed import IntArray, PackedSequences
from mltfr_dist.data.shards.reader import read_shard
from mltfr_dist.files import file_sha256


def one_item_parts(folder: Path, manifest: Manifest, stored: IntArray) -> IntArray:
    """The item of each training part of one item, ascending.

    Folders that were prepared before `items.parquet` counted them, and ones without some of their
    shards, still show those that a validation target follows: in the validation shards, as
    histories of one item.

    Args:
        folder: The prepared folder.
        manifest: Its manifest, perhaps without some shards.
        stored: [num_items + 1] how often each item occurs in the training shards of ``manifest``.

    Raises:
        DataError: A file is missing or damaged.
    """
    if not manifest.report.short_train_sequences:
        return np.zeros(0, np.int64)
    recorded = recorded_counts(folder, manifest)
    if recorded is not None and stored.sum() == read_manifest(folder).splits["train"].num_items:
        recorded -= stored
        found_here = np.flatnonzero(recorded)
        return np.repeat(found_here, recorded[found_here])
    items = [np.zeros(0, np.int64)]
    for info in manifest.splits["valid"].shards:
        sequences = read_shard(folder, info, num_items=manifest.num_items)
        alone = sequences.lengths - sequences.num_targets == 1  # one item before the targets
        items.append(sequences.items[sequences.offsets[:-1][alone]].astype(np.int64))
    return np.sort(np.concatenate(items))


def recorded_counts(folder: Path, manifest: Manifest) -> IntArray | None:
    """[num_items + 1] how often each item occurs in training, by `items.parquet`.

    Returns:
        None where it was written before it counted them.

    Raises:
        DataError: It is not what was written.
    """
    path = folder / "items.parquet"
    check_hash(path, file_sha256(path), manifest.files[path.name])
    counts = np.zeros(manifest.num_items + 1, np.int64)
    for batch in pq.ParquetFile(path).iter_batches(columns=["item_index", "count"]):
        counts[batch["item_index"].to_numpy()] = batch["count"].to_numpy()
    whole = read_manifest(folder)
    all_of_them = whole.splits["train"].num_items + whole.report.short_train_sequences
    return counts if counts.sum() == all_of_them else None


def training_sequences(folder: Path, manifest: Manifest) -> PackedSequences:
    """All training sequences of a prepared data set; those of one item stand behind the others."""
    shards = manifest.splits["train"].shards
    stored = PackedSequences.concatenate(
        [read_shard(folder, info, num_items=manifest.num_items) for info in shards]
    )
    counts = np.bincount(stored.items, minlength=manifest.num_items + 1)
    items = one_item_parts(folder, manifest, counts)
    nobody = np.full(len(items), -1)  # whose they are is not kept
    return PackedSequences.concatenate(
        [stored, PackedSequences(items, np.arange(len(items) + 1), nobody)]
    )
