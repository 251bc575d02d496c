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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
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
    "SplitWriter",
    "load_manifest",
    "read_blocks",
    "read_shard",
    "unsigned_type",
    "verify_folder",
]

PARTS = ("items.npy", "offsets.npy", "users.npy")


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

    def run(self, start: int, end: int) -> PackedSequences:
        """The sequences from ``start`` up to ``end``, views."""
        offsets = self.offsets[start : end + 1]
        return PackedSequences(
            self.items[offsets[0] : offsets[-1]], offsets - offsets[0], self.users[start:end]
        )

    def take(self, indices: np.ndarray | Sequence[int]) -> PackedSequences:
        """The sequences at ``indices`` [m], in that order (repeats allowed), without a Python loop."""
        chosen = np.asarray(indices, dtype=np.int64)
        lengths = self.lengths[chosen]
        offsets = _offsets(lengths)
        # Position j of the result belongs to sequence i; it lies j - offsets[i] after that sequence's old start.
        sources = np.repeat(self.offsets[:-1][chosen] - offsets[:-1], lengths) + np.arange(
            offsets[-1]
        )
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


class SplitWriter:
    """Writes `<split>-000000.tar`, ... of one split. Equal sequences give equal bytes, however they are handed in."""

    def __init__(
        self,
        folder: Path,
        split: str,
        *,
        num_items: int,
        num_users: int,
        sequences_per_block: int,
        sequences_per_shard: int,
        written: Sequence[ShardInfo] = (),
        on_shard: Callable[[ShardInfo, int], None] = lambda info, last_user: None,
    ) -> None:
        """Start, or go on behind the shards ``written`` before.

        Args:
            folder: where the shards go.
            split: train, valid or test; the start of file names and keys.
            num_items: greatest item id.
            num_users: one more than the greatest user_index.
            sequences_per_block: sequences of one member, at most.
            sequences_per_shard: sequences of one tar file; the last may have fewer.
            written: shards that are there already.
            on_shard: told of each finished shard, and of its last user.
        """
        self.folder, self.split, self.num_items, self.num_users = (
            folder,
            split,
            num_items,
            num_users,
        )
        self.per_block, self.per_shard, self.on_shard = (
            sequences_per_block,
            sequences_per_shard,
            on_shard,
        )
        self.shards = list(written)
        self._pending: list[PackedSequences] = []

    def add(self, sequences: PackedSequences) -> None:
        """Append sequences, in the order of their users."""
        self._pending.append(sequences)
        if sum(map(len, self._pending)) < self.per_shard:
            return
        flat, start = PackedSequences.concatenate(self._pending), 0
        while len(flat) - start >= self.per_shard:
            self._write(flat.run(start, start + self.per_shard))
            start += self.per_shard
        self._pending = [flat.run(start, len(flat))]

    def finish(self) -> SplitInfo:
        """Write the last shard; returns the split's entry for the manifest."""
        rest = PackedSequences.concatenate(self._pending) if self._pending else None
        self._pending = []
        if rest is not None and len(rest):
            self._write(rest)
        return SplitInfo(
            num_sequences=sum(shard.num_sequences for shard in self.shards),
            num_items=sum(shard.num_items for shard in self.shards),
            max_length=max(
                (shard.lengths[-1][0] for shard in self.shards if shard.lengths), default=0
            ),
            shards=tuple(self.shards),
        )

    def _write(self, sequences: PackedSequences) -> None:
        """One shard, there with its whole content or not at all."""
        path = self.folder / f"{self.split}-{len(self.shards):06d}.tar"
        first_block = sum(shard.num_blocks for shard in self.shards)
        starts = range(0, len(sequences), self.per_block)
        partial = path.with_name(f".{path.name}")
        # An open file, not a name: webdataset would run a name that begins with `pipe:`.
        with (
            partial.open("wb") as stream,
            webdataset.TarWriter(stream, user="", group="", mtime=0, encoder=False) as tar,
        ):
            for number, start in enumerate(starts, first_block):
                block = sequences.run(start, min(start + self.per_block, len(sequences)))
                tar.write(
                    _encode_block(
                        f"{self.split}-{number:08d}", block, self.num_items, self.num_users
                    )
                )
        partial.rename(path)
        info = ShardInfo(
            file=path.name,
            num_sequences=len(sequences),
            num_blocks=len(starts),
            num_items=len(sequences.items),
            bytes=path.stat().st_size,
            sha256=file_sha256(path),
            lengths=_lengths([sequences]),
        )
        self.shards.append(info)
        self.on_shard(info, int(sequences.users[-1]))


def _encode_block(
    key: str, block: PackedSequences, num_items: int, num_users: int
) -> dict[str, Any]:
    return {
        "__key__": key,
        "items.npy": _to_npy(block.items.astype(unsigned_type(num_items))),
        "offsets.npy": _to_npy(
            block.offsets.astype(np.uint32 if len(block.items) < 2**32 else np.uint64)
        ),
        "users.npy": _to_npy(block.users.astype(unsigned_type(max(num_users - 1, 0)))),
    }


def _to_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


# --- reading -----------------------------------------------------------------------------------------------------


def read_shard(
    folder: Path, info: ShardInfo, *, num_items: int, patience: Patience = PATIENT
) -> PackedSequences:
    """The sequences of one shard; see :func:`read_blocks`."""
    return PackedSequences.concatenate(
        read_blocks(folder, info, num_items=num_items, patience=patience)
    )


def read_blocks(
    folder: Path, info: ShardInfo, *, num_items: int, patience: Patience = PATIENT
) -> list[PackedSequences]:
    """Read one shard whole, verified before use: size, sha256, keys, counts, offsets, id range.

    Args:
        folder: the prepared folder.
        info: the shard's entry in the manifest.
        num_items: greatest valid item id.
        patience: how often and how long to try.

    Returns:
        its blocks in order, at least one.

    Raises:
        DataError: the shard is missing, cannot be read or differs from its entry in any way.
    """
    path = folder / info.file
    check_size(path, info)
    content = read_patiently(
        path, patience
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
            blocks[key] = _decode_block(path, sample, num_items)
    except (tarfile.TarError, ValueError, EOFError, SyntaxError, TokenError) as error:
        raise damaged(path, str(error.args[0] if error.args else error)) from None
    found = (
        len(blocks),
        sum(map(len, blocks.values())),
        sum(len(block.items) for block in blocks.values()),
    )
    expected = (info.num_blocks, info.num_sequences, info.num_items)
    if found != expected or not blocks:
        raise damaged(path, f"(blocks, sequences, items) are {found}, the manifest says {expected}")
    if info.lengths is not None and _lengths(list(blocks.values())) != info.lengths:
        raise damaged(path, "its sequences have other lengths than the manifest says")
    return list(blocks.values())


def _lengths(blocks: Sequence[PackedSequences]) -> tuple[tuple[int, int], ...]:
    """(items, number of sequences with as many), ascending."""
    counts = np.bincount(np.concatenate([block.lengths for block in blocks]))
    lengths = np.flatnonzero(counts)
    return tuple(zip(lengths.tolist(), counts[lengths].tolist()))


def _decode_block(path: Path, sample: dict[str, Any], num_items: int) -> PackedSequences:
    key = sample["__key__"]
    names = {name for name in sample if not name.startswith("__")}
    if names != set(PARTS):
        raise damaged(path, f"block {key} holds {sorted(names)}, not {sorted(PARTS)}")
    items, offsets, users = (_from_npy(sample[name]) for name in PARTS)
    for name, array in zip(PARTS, (items, offsets, users)):
        if array.ndim != 1 or array.dtype.kind != "u":
            raise damaged(
                path,
                f"block {key}: {name} is {array.dtype}{list(array.shape)}, not a flat unsigned array",
            )
    if (
        len(offsets) != len(users) + 1
        or offsets[0] != 0
        or offsets[-1] != len(items)
        or np.any(offsets[1:] <= offsets[:-1])
    ):
        raise damaged(
            path,
            f"block {key}: the offsets do not rise from 0 to {len(items)} over {len(users)} sequences",
        )
    if len(items) and not 1 <= items.min() <= items.max() <= num_items:
        raise damaged(
            path,
            f"block {key}: item ids are {items.min()}..{items.max()}, not within 1..{num_items}",
        )
    return PackedSequences(items, offsets.astype(np.int64), users)


def _from_npy(content: bytes) -> np.ndarray:
    """The array of an npy file, a view of its bytes. No size that its header claims is believed, and no code of it run.

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
