"""Read shards, verified before use: nothing that a file claims is believed."""

from __future__ import annotations

import hashlib
import io
import math
import tarfile
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
import webdataset
from numpy.lib import format as npy
from webdataset.tariterators import group_by_keys, tar_file_expander

from mltfr_dist.data.shards.manifest import ShardInfo, check_hash, check_size, damaged
from mltfr_dist.data.shards.packed import ARRAYS, TARGETS, PackedSequences, length_counts
from mltfr_dist.data.shards.retry import DEFAULT_RETRIES, RetryPolicy, read_with_retries


def read_shard(
    folder: Path, info: ShardInfo, *, num_items: int, retries: RetryPolicy = DEFAULT_RETRIES
) -> PackedSequences:
    """The sequences of one shard; see :func:`read_blocks`."""
    return PackedSequences.concatenate(
        read_blocks(folder, info, num_items=num_items, retries=retries)
    )


def read_blocks(
    folder: Path, info: ShardInfo, *, num_items: int, retries: RetryPolicy = DEFAULT_RETRIES
) -> list[PackedSequences]:
    """Read one shard whole, verified before use: size, sha256, keys, counts, offsets, id range.

    Args:
        folder: the prepared folder.
        info: the shard's entry in the manifest.
        num_items: greatest valid item id.
        retries: how often and how long to try.

    Returns:
        its blocks in order, at least one.

    Raises:
        DataError: the shard is missing, cannot be read or differs from its entry in any way.
    """
    path = folder / info.file
    check_size(path, info)
    content = read_with_retries(
        path, retries
    )  # hashed and parsed from the same bytes: the file cannot change in between
    check_hash(path, hashlib.sha256(content).hexdigest(), info.sha256)
    source = [{"url": path.name, "stream": io.BytesIO(content)}]
    samples = webdataset.DataPipeline(lambda: iter(source), tar_file_expander, group_by_keys)
    blocks: dict[str, PackedSequences] = {}
    try:
        for sample in samples:
            key = sample["__key__"]
            if key in blocks:
                raise damaged(path, f"it holds block {key} twice")
            blocks[key] = _decode_block(path, sample, num_items, info.num_targets is not None)
    except (tarfile.TarError, ValueError, EOFError, SyntaxError, TokenError) as error:
        raise damaged(path, str(error.args[0] if error.args else error)) from None
    stored = (
        len(blocks),
        sum(map(len, blocks.values())),
        sum(len(block.items) for block in blocks.values()),
    )
    expected = (info.num_blocks, info.num_sequences, info.num_items)
    if stored != expected or not blocks:
        raise damaged(
            path, f"(blocks, sequences, items) are {stored}, the manifest says {expected}"
        )
    if info.lengths is not None and length_counts(list(blocks.values())) != info.lengths:
        raise damaged(path, "its sequences have other lengths than the manifest says")
    if info.num_targets is not None:
        targets = sum(len(block.distinct_targets()[0]) for block in blocks.values())
        if targets != info.num_targets:
            raise damaged(path, f"it has {targets} targets, the manifest says {info.num_targets}")
    return list(blocks.values())


def _decode_block(
    path: Path, sample: dict[str, Any], num_items: int, has_targets: bool
) -> PackedSequences:
    key, expected = sample["__key__"], (*ARRAYS, *([TARGETS] if has_targets else []))
    names = {name for name in sample if not name.startswith("__")}
    if names != set(expected):
        raise damaged(path, f"block {key} holds {sorted(names)}, not {sorted(expected)}")
    arrays = {name: _from_npy(sample[name]) for name in expected}
    items, offsets, users = (arrays[name] for name in ARRAYS)
    for name, array in arrays.items():
        if array.ndim != 1 or array.dtype.kind != "u":
            raise damaged(
                path,
                f"block {key}: {name} is {array.dtype}{list(array.shape)}, not a flat unsigned "
                f"array",
            )
    if (
        len(offsets) != len(users) + 1
        or offsets[0] != 0
        or offsets[-1] != len(items)
        or np.any(offsets[1:] <= offsets[:-1])
    ):
        raise damaged(
            path,
            f"block {key}: the offsets do not rise from 0 to {len(items)} over {len(users)} "
            f"sequences",
        )
    if len(items) and not 1 <= items.min() <= items.max() <= num_items:
        raise damaged(
            path,
            f"block {key}: item ids are {items.min()}..{items.max()}, not within 1..{num_items}",
        )
    offsets = offsets.astype(np.int64)
    if not has_targets:
        return PackedSequences(items, offsets, users)
    targets = arrays[TARGETS].astype(np.int64)
    if len(targets) != len(users) or np.any((targets < 1) | (targets >= np.diff(offsets))):
        raise damaged(
            path, f"block {key}: a sequence has no target, or no history before its targets"
        )
    return PackedSequences(items, offsets, users, targets)


def _from_npy(content: bytes) -> np.ndarray:
    """The array of an npy file, a view of its bytes. No size that its header claims is believed,
    and no code of it run.

    Raises:
        ValueError: malformed, of objects, or the header claims another size than there is.
    """
    stream = io.BytesIO(content)
    read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(
        npy.read_magic(stream)
    )
    if read_header is None:
        raise ValueError("an npy member is of an unknown version")
    shape, _, dtype = read_header(stream)
    if dtype.hasobject:
        raise ValueError(
            "an npy member holds objects, which only running code could load (allow_pickle=False)"
        )
    claimed, there = math.prod(shape) * dtype.itemsize, len(content) - stream.tell()
    if claimed != there:
        raise ValueError(f"an npy member claims {claimed:,} bytes and has {there:,}")
    return np.frombuffer(content, dtype, offset=stream.tell()).reshape(shape)
