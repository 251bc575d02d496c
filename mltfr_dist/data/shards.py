"""Write, verify and read WebDataset shards of packed sequences, and the manifest that counts and hashes them.

A shard is a tar file; a member of it is one block of many sequences (one sequence a member reads 1000 times slower):

* ``<key>.items.npy``: item ids of all sequences, one after the other (smallest unsigned type that fits num_items)
* ``<key>.offsets.npy``: where each sequence begins, from 0, and the end of the last: n + 1 numbers (uint32 or uint64)
* ``<key>.users.npy``: user_index of each sequence (smallest unsigned type that fits)

Shapes: n sequences of a block, T items of all of them.
"""

from __future__ import annotations

import hashlib
import io
import math
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from numpy.lib import format as npy
from webdataset.tariterators import group_by_keys, tar_file_expander

from mltfr_dist.data.manifest import (
    Manifest,
    ShardInfo,
    SplitInfo,
    check_hash,
    check_size,
    damaged,
    load_manifest,
    verify_folder,
)
from mltfr_dist.data.reading import PATIENT, Patience, read_patiently
from mltfr_dist.files import file_sha256

__all__ = [
    "Manifest",
    "PackedSequences",
    "ShardInfo",
    "SplitInfo",
    "load_manifest",
    "read_shard",
    "unsigned_type",
    "verify_folder",
    "write_split",
]

PARTS = ("items.npy", "offsets.npy", "users.npy")
Rows = Iterable[tuple[np.ndarray, np.ndarray]]
"""Chunks of (user_index [c], item_index [c]), sorted by user, a user's items oldest first."""


@dataclass(frozen=True)
class PackedSequences:
    """Many sequences in three flat arrays.

    Attributes:
        items: [T] item ids, oldest first within a sequence.
        offsets: [n + 1] int64; sequence i is ``items[offsets[i]:offsets[i + 1]]``.
        users: [n] user_index.
    """

    items: np.ndarray
    offsets: np.ndarray
    users: np.ndarray

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, index: int) -> np.ndarray:
        """Item ids of one sequence, a view. Negative indices count from the end."""
        position = range(len(self))[index]
        return self.items[self.offsets[position] : self.offsets[position + 1]]

    @property
    def lengths(self) -> np.ndarray:
        """[n] int64, items of each sequence."""
        return np.diff(self.offsets)

    def take(self, indices: np.ndarray | Sequence[int]) -> PackedSequences:
        """The sequences at ``indices`` [m], in that order (repeats allowed), without a Python loop."""
        chosen = np.asarray(indices, dtype=np.int64)
        lengths = self.lengths[chosen]
        offsets = _offsets(lengths)
        # Position j of the result belongs to sequence i; it lies j - offsets[i] after that sequence's old start.
        sources = np.repeat(self.offsets[:-1][chosen] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return PackedSequences(self.items[sources], offsets, self.users[chosen])

    @staticmethod
    def concatenate(parts: Sequence[PackedSequences]) -> PackedSequences:
        """All sequences of ``parts``, in order. At least one part is needed."""
        return PackedSequences(
            np.concatenate([part.items for part in parts]),
            _offsets(np.concatenate([part.lengths for part in parts])),
            np.concatenate([part.users for part in parts]),
        )


def _offsets(lengths: np.ndarray) -> np.ndarray:
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def unsigned_type(maximum: int) -> np.dtype[Any]:
    """The smallest unsigned integer type that holds ``maximum``."""
    return np.min_scalar_type(maximum)


# --- writing -----------------------------------------------------------------------------------------------------


def write_split(
    folder: Path, split: str, rows: Rows, *, num_items: int, num_users: int, sequences_per_block: int, sequences_per_shard: int
) -> SplitInfo:
    """Write `<split>-000000.tar`, ... into ``folder``. Equal input gives equal bytes.

    Args:
        folder: where the shards go.
        split: train, valid or test; the start of file names and keys.
        rows: chunks of (user_index, item_index), sorted by user, a user's items oldest first.
        num_items: greatest item id.
        num_users: one more than the greatest user_index.
        sequences_per_block: sequences of one member, at most.
        sequences_per_shard: sequences of one tar file, at most; the last block of a shard is cut to fit.
    """
    shards: list[ShardInfo] = []
    max_length = num_blocks = 0
    for blocks in _group_blocks(_pack(rows, min(sequences_per_block, sequences_per_shard)), sequences_per_shard):
        path = folder / f"{split}-{len(shards):06d}.tar"
        # An open file, not a name: webdataset would run a name that begins with `pipe:`.
        with path.open("wb") as stream, webdataset.TarWriter(stream, user="", group="", mtime=0, encoder=False) as tar:
            for block in blocks:
                tar.write(_encode_block(f"{split}-{num_blocks:08d}", block, num_items, num_users))
                num_blocks += 1
        shards.append(
            ShardInfo(
                file=path.name,
                num_sequences=sum(map(len, blocks)),
                num_blocks=len(blocks),
                num_items=sum(len(block.items) for block in blocks),
                bytes=path.stat().st_size,
                sha256=file_sha256(path),
                lengths=_count_lengths(blocks),
            )
        )
        max_length = max(max_length, *(int(block.lengths.max()) for block in blocks))
    return SplitInfo(
        num_sequences=sum(shard.num_sequences for shard in shards),
        num_items=sum(shard.num_items for shard in shards),
        max_length=max_length,
        shards=tuple(shards),
    )


def _count_lengths(blocks: list[PackedSequences]) -> tuple[tuple[int, int], ...]:
    lengths, sequences = np.unique(np.concatenate([block.lengths for block in blocks]), return_counts=True)
    return tuple(zip(lengths.tolist(), sequences.tolist()))


def _pack(rows: Rows, per_block: int) -> Iterator[PackedSequences]:
    """Blocks of ``per_block`` sequences (the last may have fewer) from sorted rows."""
    pending: list[tuple[np.ndarray, np.ndarray]] = []
    num_pending = 0  # users that began within `pending`
    last_user: int | None = None
    for users, items in rows:
        if not len(users):
            continue
        pending.append((users, items))
        num_pending += int(np.count_nonzero(np.diff(users))) + int(last_user != int(users[0]))
        last_user = int(users[-1])
        if num_pending <= per_block:  # the last user may go on in the next chunk
            continue
        flat = _pack_all(pending)
        whole = (len(flat) - 1) // per_block * per_block
        for start in range(0, whole, per_block):
            yield flat.take(np.arange(start, start + per_block))
        end = int(flat.offsets[whole])
        all_users = np.concatenate([chunk[0] for chunk in pending])
        pending, num_pending = [(all_users[end:], flat.items[end:])], len(flat) - whole
    if pending:
        yield _pack_all(pending)


def _pack_all(chunks: list[tuple[np.ndarray, np.ndarray]]) -> PackedSequences:
    users = np.concatenate([chunk[0] for chunk in chunks])
    items = np.concatenate([chunk[1] for chunk in chunks])
    starts = np.flatnonzero(np.diff(users, prepend=-1))
    return PackedSequences(items, np.append(starts, len(users)).astype(np.int64), users[starts])


def _group_blocks(blocks: Iterable[PackedSequences], per_shard: int) -> Iterator[list[PackedSequences]]:
    group: list[PackedSequences] = []
    room = per_shard
    for block in blocks:
        while len(block) > room:
            group.append(block.take(np.arange(room)))
            yield group
            block = block.take(np.arange(room, len(block)))
            group, room = [], per_shard
        group.append(block)
        room -= len(block)
        if room == 0:
            yield group
            group, room = [], per_shard
    if group:
        yield group


def _encode_block(key: str, block: PackedSequences, num_items: int, num_users: int) -> dict[str, Any]:
    return {
        "__key__": key,
        "items.npy": _to_npy(block.items.astype(unsigned_type(num_items))),
        "offsets.npy": _to_npy(block.offsets.astype(np.uint32 if len(block.items) < 2**32 else np.uint64)),
        "users.npy": _to_npy(block.users.astype(unsigned_type(max(num_users - 1, 0)))),
    }


def _to_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


# --- reading -----------------------------------------------------------------------------------------------------


def read_shard(folder: Path, info: ShardInfo, *, num_items: int, patience: Patience = PATIENT) -> PackedSequences:
    """Read one shard whole, verified before use: size, sha256, keys, counts, offsets, id range.

    Args:
        folder: the prepared folder.
        info: the shard's entry in the manifest.
        num_items: greatest valid item id.
        patience: how often and how long to try.

    Raises:
        DataError: the shard is missing, cannot be read or differs from its entry in any way.
    """
    path = folder / info.file
    check_size(path, info)
    content = read_patiently(path, patience)  # hashed and parsed from the same bytes: the file cannot change in between
    check_hash(path, hashlib.sha256(content).hexdigest(), info.sha256)
    source = [{"url": path.name, "stream": io.BytesIO(content)}]
    samples = webdataset.DataPipeline(lambda: iter(source), tar_file_expander, group_by_keys)
    blocks: dict[str, PackedSequences] = {}
    try:
        for sample in samples:
            key = sample["__key__"]
            if key in blocks:
                raise damaged(path, f"it holds block {key} twice")
            blocks[key] = _decode_block(path, sample, num_items)
    except (tarfile.TarError, ValueError, EOFError, SyntaxError) as error:
        raise damaged(path, str(error.args[0] if error.args else error)) from None
    found = (len(blocks), sum(map(len, blocks.values())), sum(len(block.items) for block in blocks.values()))
    expected = (info.num_blocks, info.num_sequences, info.num_items)
    if found != expected or not blocks:
        raise damaged(path, f"(blocks, sequences, items) are {found}, the manifest says {expected}")
    return PackedSequences.concatenate(list(blocks.values()))


def _decode_block(path: Path, sample: dict[str, Any], num_items: int) -> PackedSequences:
    key = sample["__key__"]
    names = {name for name in sample if not name.startswith("__")}
    if names != set(PARTS):
        raise damaged(path, f"block {key} holds {sorted(names)}, not {sorted(PARTS)}")
    items, offsets, users = (_from_npy(sample[name]) for name in PARTS)
    for name, array in zip(PARTS, (items, offsets, users)):
        if array.ndim != 1 or array.dtype.kind != "u":
            raise damaged(path, f"block {key}: {name} is {array.dtype}{list(array.shape)}, not a flat unsigned array")
    if len(offsets) != len(users) + 1 or offsets[0] != 0 or offsets[-1] != len(items) or np.any(offsets[1:] <= offsets[:-1]):
        raise damaged(path, f"block {key}: the offsets do not rise from 0 to {len(items)} over {len(users)} sequences")
    if len(items) and not 1 <= items.min() <= items.max() <= num_items:
        raise damaged(path, f"block {key}: item ids are {items.min()}..{items.max()}, not within 1..{num_items}")
    return PackedSequences(items, offsets.astype(np.int64), users)


def _from_npy(content: bytes) -> np.ndarray:
    """The array of an npy file, a view of its bytes. No size that its header claims is believed, and no code of it run.

    Raises:
        ValueError: malformed, of objects, or the header claims another size than there is.
    """
    stream = io.BytesIO(content)
    read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(npy.read_magic(stream))
    if read_header is None:
        raise ValueError("an npy member is of an unknown version")
    shape, _, dtype = read_header(stream)
    if dtype.hasobject:
        raise ValueError("an npy member holds objects, which only running code could load (allow_pickle=False)")
    claimed, there = math.prod(shape) * dtype.itemsize, len(content) - stream.tell()
    if claimed != there:
        raise ValueError(f"an npy member claims {claimed:,} bytes and has {there:,}")
    return np.frombuffer(content, dtype, offset=stream.tell()).reshape(shape)
