"""Write shards: equal sequences give equal bytes, and a file is there whole or not at all."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

from mltfr_dist.data.shards.manifest import ShardInfo, SplitInfo
from mltfr_dist.data.shards.packed import (
    TARGETS,
    PackedSequences,
    length_counts,
    unsigned_type,
)
from mltfr_dist.files import file_sha256, replacing


class SplitWriter:
    """Writes `<split>-000000.tar`, ... of one split. Equal sequences give equal bytes, however they
    are handed in.
    """

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
        # An open file, not a name: webdataset would run a name that begins with `pipe:`.
        with (
            replacing(path) as partial,
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
        info = ShardInfo(
            file=path.name,
            num_sequences=len(sequences),
            num_blocks=len(starts),
            num_items=len(sequences.items),
            bytes=path.stat().st_size,
            sha256=file_sha256(path),
            lengths=length_counts([sequences]),
            num_targets=None if sequences.targets is None else len(sequences.distinct_targets()[0]),
        )
        self.shards.append(info)
        self.on_shard(info, int(sequences.users[-1]))


def _encode_block(
    key: str, block: PackedSequences, num_items: int, num_users: int
) -> dict[str, Any]:
    several = {} if block.targets is None else {TARGETS: _to_npy(block.targets.astype(np.uint32))}
    return {
        "__key__": key,
        "items.npy": _to_npy(block.items.astype(unsigned_type(num_items))),
        "offsets.npy": _to_npy(
            block.offsets.astype(np.uint32 if len(block.items) < 2**32 else np.uint64)
        ),
        "users.npy": _to_npy(block.users.astype(unsigned_type(max(num_users - 1, 0)))),
        **several,
    }


def _to_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()
