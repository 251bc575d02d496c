"""Shards to batches: exact, deterministic, resumable.

The order of an epoch depends on (seed, epoch) alone (see order.py). Global batch s holds the same
samples at any world size and with any number of loader workers. Ranks deal out its samples among
themselves by length, so each has the same number of steps and nearly the same work; each sample
comes exactly once an epoch, and the last batch is filled with empty rows, which weigh nothing, or
left out.

As an epoch's order is a function, a stream's whole state is (epoch, step), and any step can be made
by itself: resuming skips through the index of shard sizes and reads nothing that is not needed, and
loader workers share nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mltfr_dist.config import DataConfig
from mltfr_dist.data.batch import SequenceBatch
from mltfr_dist.data.shards.manifest import Manifest, load_manifest
from mltfr_dist.data.shards.packed import IntArray, PackedSequences
from mltfr_dist.data.shards.reader import read_blocks
from mltfr_dist.data.shards.retry import RetryPolicy
from mltfr_dist.data.stream.collate import Collator, Objective, Samples, Step
from mltfr_dist.data.stream.loader import steps_from_workers
from mltfr_dist.data.stream.order import EpochOrder, samples_by_shard
from mltfr_dist.errors import ConfigError

NEXT_ITEM = Objective()


@dataclass(frozen=True)
class BatchLayout:
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
                f"training.global_batch_size {self.global_batch_size} cannot be dealt out to "
                f"{self.world_size} ranks in "
                f"micro-batches of {self.micro_batch_size}.",
                rule="global_batch_size must be a multiple of world_size x micro_batch_size.",
                remedy="Change training.global_batch_size, training.micro_batch_size or the number "
                "of ranks.",
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
    """Samples of the global batch."""

    def counts(self) -> dict[str, int]:
        """What terms of the loss are means over, by name."""
        return {
            "targets": self.num_targets,
            "positions": self.num_positions,
            "sequences": self.num_sequences,
        }


class TrainStream:
    """Training batches of one rank."""

    def __init__(
        self,
        folder: Path,
        config: DataConfig,
        layout: BatchLayout,
        *,
        seed: int,
        objective: Objective = NEXT_ITEM,
        manifest: Manifest | None = None,
        split: str = "train",
    ) -> None:
        self.folder, self.config, self.layout, self.seed, self.objective = (
            folder,
            config,
            layout,
            seed,
            objective,
        )
        self.manifest = manifest or load_manifest(folder, left_out=config.left_out)
        self._retries = RetryPolicy(config.read_attempts, config.read_timeout)
        self.split = self.manifest.splits[split]
        if self.split.num_sequences < layout.world_size:
            raise ConfigError(
                f"There are {layout.world_size} ranks and {self.split.num_sequences} training "
                f"sequences in {folder}.",
                rule="Every rank needs at least one sequence.",
                remedy="Start fewer ranks (`--num_gpus`), or prepare more data.",
            )
        if layout.micro_batch_size % objective.group_size:
            raise ConfigError(
                f"backbone.cl4srec.contrast_group is {objective.group_size}, but a micro-batch "
                f"holds {layout.micro_batch_size} sequences.",
                rule="Sequences that are contrasted must sit in one micro-batch, or the loss would "
                "depend on the division.",
                remedy="Choose backbone.cl4srec.contrast_group so that it divides "
                "training.micro_batch_size (or global_batch_size / ranks).",
            )
        shape = (config.max_len, self.manifest.num_items, seed, layout.micro_batch_size)
        self.collator = Collator(objective, *shape, last_only=config.samples == "prefixes")
        self._counts = samples_by_shard(self.split, config, folder)
        if not self.steps_per_epoch:
            raise ConfigError(
                f"An epoch of {self.num_samples} samples has no whole batch of "
                f"{layout.global_batch_size}.",
                rule="data.last_batch=drop leaves out the last batch if it is not full.",
                remedy="Lower training.global_batch_size, or set data.last_batch=pad.",
            )
        self._order: EpochOrder | None = None
        self._windows: dict[int, Samples] = {}
        self._pool: tuple[int, list[IntArray]] | None = None

    @property
    def num_samples(self) -> int:
        """Samples of an epoch: training sequences, their sliding windows, or their prefixes."""
        return int(self._counts.sum())

    @property
    def steps_per_epoch(self) -> int:
        """Updates in one epoch, the same for every rank."""
        whole, rest = divmod(self.num_samples, self.layout.global_batch_size)
        return whole + (rest > 0 and self.config.last_batch == "pad")

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[StepBatches]:
        """This rank's share of each global batch, from ``start_step`` on.

        Raises:
            DataError: A shard is damaged (before any of its sequences is used), or a loader worker
                has died.
        """
        steps = range(start_step, self.steps_per_epoch)
        if self.config.num_workers:
            yield from steps_from_workers(
                lambda step: self.step(epoch, step), steps, self.config.num_workers
            )
        else:
            for step in steps:
                yield self.step(epoch, step)

    def step(self, epoch: int, step: int) -> StepBatches:
        """This rank's share of one global batch. Fastest where steps are asked for in order.

        Raises:
            DataError: A shard is damaged.
        """
        if self._order is None or self._order.epoch != epoch:
            self._order = EpochOrder(self._counts, self.config.shuffle_shards, self.seed, epoch)
            self._windows, self._pool = {}, None
        indices = self._indices(self._order, step)
        return self._deal(Step(self._samples(self._order, indices), indices, epoch, step))

    # --- order
    # --------------------------------------------------------------------------------------------

    def windows(self, epoch: int) -> list[list[int]]:
        """Shard numbers of each window of ``epoch``, in order."""
        return EpochOrder(self._counts, self.config.shuffle_shards, self.seed, epoch).windows

    def _indices(self, order: EpochOrder, step: int) -> IntArray:
        """Positions of global batch ``step``."""
        size, per_pool = self.layout.global_batch_size, self.config.length_pool
        used = min(self.num_samples, self.steps_per_epoch * size)
        if per_pool == 1:
            return np.arange(step * size, min((step + 1) * size, used))
        pool, first = step // per_pool, step // per_pool * per_pool * size
        if self._pool is None or self._pool[0] != pool:
            indices = np.arange(first, min(first + per_pool * size, used))
            self._pool = pool, order.grouped(pool, self._samples(order, indices).lengths, size)
        return first + self._pool[1][step % per_pool]

    def _samples(self, order: EpochOrder, indices: IntArray) -> Samples:
        """What lies at ``indices``; the windows that hold them stay loaded until others are asked
        for.
        """
        first, last = order.window_of(np.array([indices.min(), indices.max()])).tolist()
        needed = range(first, last + 1)
        if self.config.length_pool == 1 or not set(needed) <= self._windows.keys():
            self._windows = {
                number: window for number, window in self._windows.items() if number in needed
            }
        for number in needed:
            if number not in self._windows:
                self._windows[number] = self._window(order, number)
        if first == last:
            return self._windows[first].take(indices - order.starts[first])
        numbers = order.window_of(indices)
        within = indices - order.starts[numbers]
        rows_of_shards = [np.flatnonzero(numbers == number) for number in needed]
        joined = Samples.join(
            [
                self._windows[number].take(within[rows])
                for number, rows in zip(needed, rows_of_shards)
            ]
        )
        return joined.take(np.argsort(np.concatenate(rows_of_shards)))

    def _window(self, order: EpochOrder, number: int) -> Samples:
        """All samples of a window, in the order of its indices."""
        infos = [self.split.shards[i] for i in order.windows[number]]
        num_items, retries = self.manifest.num_items, self._retries
        shards = (
            read_blocks(self.folder, info, num_items=num_items, retries=retries) for info in infos
        )
        sequences = PackedSequences.concatenate([block for blocks in shards for block in blocks])
        return Samples.of(sequences, self.config).take(order.permutation(number))

    # --- batches
    # --------------------------------------------------------------------------------------------

    def _deal(self, step: Step) -> StepBatches:
        """Deal out groups of samples of like length to the ranks, there and back (0, 1, 1, 0, ...):
        in one direction, the first rank would get the longer of each two.
        """
        histories = step.samples.history_ends - step.samples.history_starts
        by_length = np.lexsort((-histories, -step.samples.lengths))
        micro = self.layout.micro_batch_size
        world_size = self.layout.world_size
        cycle, turn = divmod(np.arange(len(by_length)) // self.objective.group_size, world_size)
        turn = np.where(cycle % 2, world_size - 1 - turn, turn)
        mine = by_length[turn == self.layout.rank]
        num_targets, num_positions = self.collator.counts(step)
        shares = [mine[i * micro : (i + 1) * micro] for i in range(self.layout.grad_accum_steps)]
        batches = [self.collator.batch(step, share) for share in shares]
        return StepBatches(batches, num_targets, num_positions, len(step.sample_ids))
