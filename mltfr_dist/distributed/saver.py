"""Saves of a stage: every rank writes its files by a thread, while all wait or while training goes
on.

Rank 0 writes what is whole, and of a divided item table each rank its own rows. What is written in
the background was copied to host memory at its step. Threads only write and fsync; ranks tell each
other that they are done in the message of a step (`health.py`), and then, all at the same point,
rank 0 writes the header that makes the checkpoint complete.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

from mltfr_dist.distributed.checkpoint import (
    MODEL,
    OPTIMIZER,
    Progress,
    begin,
    finish,
    partial_of,
)
from mltfr_dist.distributed.divided_files import MODEL_ROWS, OPTIMIZER_ROWS, file_name
from mltfr_dist.distributed.divided_optimizer import DividedOptimizer
from mltfr_dist.distributed.engine import Engine
from mltfr_dist.distributed.rank_files import Files, RankFiles
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.distributed.state import (
    begin_optimizer_state,
    whole_optimizer_state,
    whole_parameters,
)
from mltfr_dist.errors import CheckpointError, MltfrError

CHECKED_ELEMENTS = 1 << 20
"""Numbers looked at together, so that a check needs no memory of a tensor's size."""


class _Save(NamedTuple):
    """A checkpoint that is not complete yet."""

    folder: Path
    progress: Progress
    files: RankFiles
    then: Callable[[], object]


class Saver:
    """Writes an engine's checkpoints. All ranks must call its methods at the same point."""

    def __init__(self, engine: Engine, *, background: bool = False) -> None:
        """Args: engine: whose state; background: whether training goes on meanwhile."""
        self.engine, self.ranks, self.background = engine, engine.ranks, background
        self._running: list[_Save] = []
        self._weights: Files = {}
        engine.health.writes = lambda: not all(save.files.is_done for save in self._running)

    def save(
        self,
        folder: Path,
        progress: Progress,
        *,
        with_optimizer: bool = True,
        then: Callable[[], object] = lambda: None,
    ) -> None:
        """Write a checkpoint to ``folder``, replacing one of that name; in the background what was
        begun at an earlier step is finished first.

        Args:
            folder: Its path.
            progress: Where the run stands.
            with_optimizer: Whether it is one to go on from.
            then: What rank 0 does once it is complete.

        Raises:
            CheckpointError: A tensor is not finite: what was saved before must not be superseded by
                it. Or see :meth:`finish`.
        """
        if self._running and self._running[-1].progress.step != progress.step:
            self.finish()
        files = self._files(progress, with_optimizer)
        self.ranks.on_rank0(lambda _: begin(folder))
        self._running.append(_Save(folder, progress, RankFiles(folder, files), then))
        if not self.background:
            self.finish()

    def finish(self) -> None:
        """Wait for what is being written, and make it complete.

        Raises:
            CheckpointError: A disk did not take it, or another process has taken the folder over;
                the checkpoints before are as they were.
        """
        while self._running:
            save, ranks = self._running[0], self.ranks
            while ranks.max(torch.tensor([float(not save.files.is_done)])).item():
                save.files.wait()
            try:
                told = ranks.texts(json.dumps(ranks.jointly(save.files.hashes)))
                hashes = {name: h for text in told for name, h in json.loads(text).items()}
                ranks.on_rank0(partial(_complete, save, hashes))
            except MltfrError:
                for save in self._running:
                    save.files.give_up()
                ranks.barrier()  # nobody writes any more
                self._remove()
                raise
            del self._running[0]
        self._weights = {}

    def give_up(self) -> None:
        """End the threads and say so; for errors of which other ranks may not know."""
        for save in self._running:
            save.files.give_up()
            self.ranks.say(
                f"  the save of {save.folder.name} in the background was given up, as the run ends "
                "with an error: the checkpoint before it is the last"
            )
        self._remove()

    def __enter__(self) -> Self:
        """What still runs when the block ends with an error is given up."""
        return self

    def __exit__(self, *_: object) -> None:
        self.give_up()

    def _remove(self) -> None:
        for save in self._running if self.ranks.is_main else ():
            shutil.rmtree(partial_of(save.folder), ignore_errors=True)
        self._running.clear()
        self._weights = {}

    def _files(self, progress: Progress, with_optimizer: bool) -> Files:
        """What this rank is to write, apart from what training changes where it goes on."""
        engine, files = self.engine, Files()
        taken = bool(self._running)  # at this very step, in the background
        if not taken:
            files[MODEL] = whole_parameters(engine)
        if with_optimizer:
            if progress.step == progress.skipped_steps:  # no update yet: the optimizer has no state
                begin_optimizer_state(engine)
            files[OPTIMIZER] = whole_optimizer_state(engine)
        files |= own_rows(engine, weights=not taken, moments=with_optimizer)
        check_finite(files, progress, self.ranks)
        if not self.ranks.is_main:
            files = {name: state for name, state in files.items() if name not in (MODEL, OPTIMIZER)}
        if self.background:
            live = _live(engine)
            files = {
                name: {n: _apart(t, live) for n, t in state.items()}
                for name, state in files.items()
            }
            self._weights |= {n: s for n, s in files.items() if n.startswith("model")}
        return self._weights | files


def own_rows(engine: Engine, *, weights: bool, moments: bool) -> Files:
    """This rank's rows of a divided item table; nothing where it is whole."""
    rows, own = engine.row_adam, Files()
    if isinstance(rows, DividedOptimizer):
        rank, world_size = engine.ranks.rank, engine.ranks.world_size
        if weights:
            own[file_name(MODEL_ROWS, rank, world_size)] = {rows.name: rows.rows.weight}
        if moments:
            state = {f"{rows.name}/{key}": t for key, t in rows.moments.items()}
            own[file_name(OPTIMIZER_ROWS, rank, world_size)] = state
    return own


def _live(engine: Engine) -> set[int]:
    """Addresses of the tables and moments that are looked at where they are, as they may be as
    large as all memory that is left; all else was copied when it was put together.
    """
    rows = engine.row_adam
    tables = () if rows is None else (rows.rows.weight, *rows.moments.values())
    return {t.data_ptr() for t in tables}


def _apart(tensor: Tensor, live: set[int]) -> Tensor:
    """A tensor in host memory of its own."""
    here = tensor.detach().cpu()
    return here.clone() if here.data_ptr() in live else here


def _complete(save: _Save, hashes: dict[str, str], _heartbeat: object) -> None:
    finish(save.folder, save.progress, hashes)
    save.then()


def check_finite(files: Files, progress: Progress, ranks: Ranks) -> None:
    """Look at every number, some of them at a time. All ranks must call.

    Raises:
        CheckpointError: One is not finite on some rank.
    """
    named = [(name, t) for state in files.values() for name, t in state.items()]
    bad = ranks.max(torch.tensor([float(not _is_finite(t)) for _, t in named])).tolist()
    damaged = [name for (name, _), is_bad in zip(named, bad, strict=True) if is_bad]
    if damaged:
        raise ranks.rank0_raises(
            CheckpointError(
                f"Not saved at step {progress.step} of stage `{progress.stage}`: "
                f"{', '.join(damaged)} "
                f"{'is' if len(damaged) == 1 else 'are'} not finite.",
                rule="A checkpoint holds finite numbers; those saved before are kept.",
                remedy="Lower optimizer.learning_rate or set optimizer.max_grad_norm.",
            )
        )


def _is_finite(tensor: Tensor) -> bool:
    """By the smallest and largest of some numbers at a time, for which nothing is formed."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    chunks = torch.split(tensor.detach().flatten(), CHECKED_ELEMENTS)
    return all(torch.isfinite(limit) for chunk in chunks for limit in torch.aminmax(chunk))
