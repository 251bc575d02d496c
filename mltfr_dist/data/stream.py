"""Shards to batches: exact, deterministic, resumable.

The order of an epoch depends on (seed, epoch) alone: the order of shards is shuffled, and the sequences of
``shuffle_shards`` consecutive shards (a *window*) are shuffled together. Global batch s is the s-th run of
``global_batch_size`` sequences of that order, at any world size. Ranks deal out its sequences among themselves by
length, so each has the same number of steps and nearly the same work; each sequence comes exactly once an epoch, and
the last batch is filled with empty rows, which weigh nothing.

As an epoch's order is a function, a stream's whole state is (epoch, step): resuming skips through the index of shard
sizes and reads nothing that is not needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from mltfr_dist.config import DataConfig
from mltfr_dist.data.batch import PADDING_IDX, RankingBatch, SequenceBatch
from mltfr_dist.data.collate import Collator, Objective, Step, last_items
from mltfr_dist.data.shards import Manifest, PackedSequences, ShardInfo, load_manifest, read_shard
from mltfr_dist.errors import ConfigError

IntArray = npt.NDArray[np.int64]
NEXT_ITEM = Objective()


@dataclass(frozen=True)
class Part:
    """One rank's share of every global batch."""

    rank: int
    world_size: int
    global_batch_size: int
    """Sequences per update over all ranks."""
    micro_batch_size: int
    """Sequences per forward-backward pass of one rank."""

    def __post_init__(self) -> None:
        if self.global_batch_size % (self.world_size * self.micro_batch_size):
            raise ConfigError(
                f"training.global_batch_size {self.global_batch_size} cannot be dealt out to {self.world_size} ranks in "
                f"micro-batches of {self.micro_batch_size}.",
                rule="global_batch_size must be a multiple of world_size x micro_batch_size.",
                remedy="Change training.global_batch_size, training.micro_batch_size or the number of ranks.",
            )

    @property
    def grad_accum_steps(self) -> int:
        """Micro-batches of a rank per update."""
        return self.global_batch_size // (self.world_size * self.micro_batch_size)


class StepBatches(NamedTuple):
    """One rank's share of one global batch."""

    micro_batches: list[SequenceBatch]
    """``grad_accum_steps`` batches of ``micro_batch_size`` rows."""
    num_targets: int
    """Positions that are scored in the *global* batch, over all ranks and micro-batches."""
    num_positions: int
    """Real positions that are read in the global batch."""
    num_sequences: int
    """Sequences of the global batch."""


class TrainStream:
    """Training batches of one rank."""

    def __init__(
        self,
        folder: Path,
        config: DataConfig,
        part: Part,
        *,
        seed: int,
        objective: Objective = NEXT_ITEM,
        manifest: Manifest | None = None,
    ) -> None:
        self.folder, self.config, self.part, self.seed, self.objective = folder, config, part, seed, objective
        self.manifest = manifest or load_manifest(folder)
        self.split = self.manifest.splits["train"]
        if self.split.num_sequences < part.world_size:
            raise ConfigError(
                f"There are {part.world_size} ranks and {self.split.num_sequences} training sequences in {folder}.",
                rule="Every rank needs at least one sequence.",
                remedy="Start fewer ranks (`--num_gpus`), or prepare more data.",
            )
        if part.micro_batch_size % objective.group_size:
            raise ConfigError(
                f"loss.contrast_group is {objective.group_size}, but a micro-batch holds {part.micro_batch_size} sequences.",
                rule="Sequences that are contrasted must sit in one micro-batch, or the loss would depend on the division.",
                remedy="Choose loss.contrast_group so that it divides training.micro_batch_size (or global_batch_size / ranks).",
            )
        self.collator = Collator(objective, config.max_len, self.manifest.num_items, seed, part.micro_batch_size)
        self._loaded: dict[int, PackedSequences] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Updates in one epoch, the same for every rank."""
        return -(-self.split.num_sequences // self.part.global_batch_size)

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[StepBatches]:
        """This rank's share of each global batch, from ``start_step`` on.

        Raises:
            DataError: A shard is damaged (before any of its sequences is used).
        """
        size = self.part.global_batch_size
        for step, (sequences, sample_ids) in enumerate(self._global_batches(epoch, start_step * size), start_step):
            assert step < self.steps_per_epoch
            yield self._deal(Step(sequences, sample_ids, epoch, step))

    # --- order -------------------------------------------------------------------------------------------------

    def windows(self, epoch: int) -> list[list[int]]:
        """Shard numbers of each window of ``epoch``, in order."""
        order = np.random.default_rng((self.seed, epoch, 0)).permutation(len(self.split.shards))
        width = self.config.shuffle_shards
        return [sorted(order[i : i + width].tolist()) for i in range(0, len(order), width)]

    def _global_batches(self, epoch: int, start: int) -> Iterator[tuple[PackedSequences, IntArray]]:
        """Global batches from the ``start``-th sequence of the epoch on, with their sequences' places in the order."""
        size, place = self.part.global_batch_size, 0
        rest: PackedSequences | None = None
        for number, shards in enumerate(self.windows(epoch)):
            count = sum(self.split.shards[i].num_sequences for i in shards)
            skip = max(0, min(start - place, count))
            place += skip
            if skip == count:
                continue
            order = np.random.default_rng((self.seed, epoch, 1, number)).permutation(count)[skip:]
            window = self._window(shards)
            taken = 0
            while taken < len(order):
                missing = size - (len(rest) if rest is not None else 0)
                part = window.take(order[taken : taken + missing])
                taken += len(part)
                rest = part if rest is None else PackedSequences.concatenate([rest, part])
                if len(rest) == size:
                    yield rest, np.arange(place, place + size)
                    place, rest = place + size, None
        if rest is not None:
            yield rest, np.arange(place, place + len(rest))

    def _window(self, shards: list[int]) -> PackedSequences:
        kept = {i: self._loaded[i] for i in shards if i in self._loaded}
        self._loaded = kept  # what is not in this window goes before the next shards come
        for i in shards:
            if i not in kept:
                kept[i] = read_shard(self.folder, self.split.shards[i], num_items=self.manifest.num_items)
        return PackedSequences.concatenate([kept[i] for i in shards])

    # --- batches -----------------------------------------------------------------------------------------------

    def _deal(self, step: Step) -> StepBatches:
        """Deal out groups of sequences of like length to the ranks in turn."""
        by_length = np.argsort(-np.diff(step.sequences.offsets), kind="stable")
        group, micro = self.objective.group_size, self.part.micro_batch_size
        groups = [by_length[i : i + group] for i in range(0, len(by_length), group)]
        mine = np.concatenate([by_length[:0], *groups[self.part.rank :: self.part.world_size]])
        num_targets, num_positions = self.collator.counts(step)
        shares = [mine[i * micro : (i + 1) * micro] for i in range(self.part.grad_accum_steps)]
        batches = [self.collator.batch(step, share) for share in shares]
        return StepBatches(batches, num_targets, num_positions, len(step.sequences))


class RankingStream:
    """Batches of one rank for full ranking of a split ("valid" or "test").

    Batch i holds the same users at any world size and goes to rank i mod world_size; ranks that run out get batches of
    empty rows, so that all take part in every collective.
    """

    def __init__(self, folder: Path, split: str, *, max_len: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.folder, self.max_len, self.batch_size, self.rank, self.world_size = folder, max_len, batch_size, rank, world_size
        self.manifest = load_manifest(folder)
        self.split = self.manifest.splits[split]

    @property
    def num_users(self) -> int:
        """Users that are ranked, over all ranks."""
        return self.split.num_sequences

    def __iter__(self) -> Iterator[RankingBatch]:
        batches = -(-self.num_users // self.batch_size)
        rounds = -(-batches // self.world_size)
        given = 0
        for number, sequences in enumerate(self._batches(self.split.shards)):
            if number % self.world_size == self.rank:
                given += 1
                yield ranking_batch(sequences, self.max_len)
        for _ in range(rounds - given):
            empty = torch.zeros(0, dtype=torch.int64)
            yield RankingBatch(torch.zeros(1, 1, dtype=torch.int64), torch.full((1,), PADDING_IDX), empty, empty)

    def _batches(self, shards: tuple[ShardInfo, ...]) -> Iterator[PackedSequences]:
        rest: list[PackedSequences] = []
        for info in shards:
            rest.append(read_shard(self.folder, info, num_items=self.manifest.num_items))
            whole = PackedSequences.concatenate(rest)
            full = len(whole) // self.batch_size * self.batch_size
            for start in range(0, full, self.batch_size):
                yield whole.take(np.arange(start, start + self.batch_size))
            rest = [whole.take(np.arange(full, len(whole)))]
        if rest and len(rest[0]):
            yield rest[0]


def ranking_batch(sequences: PackedSequences, max_len: int) -> RankingBatch:
    """Sequences whose last item is the target -> a batch of their last ``max_len`` history items."""
    everyone = np.arange(len(sequences))
    sizes = np.diff(sequences.offsets)
    recent = last_items(sequences, everyone, max_len + 1, len(sequences))
    kept = np.minimum(sizes, max_len + 1)
    targets = recent[everyone, kept - 1].copy()
    recent[everyone, kept - 1] = PADDING_IDX
    rows = np.repeat(everyone, sizes)
    is_history = np.ones(len(sequences.items), dtype=bool)
    is_history[sequences.offsets[1:] - 1] = False
    return RankingBatch(
        torch.from_numpy(recent[:, : max(1, recent.shape[1] - 1)].copy()),
        torch.from_numpy(targets),
        torch.from_numpy(rows[is_history]),
        torch.from_numpy(sequences.items[is_history].astype(np.int64)),
    )
