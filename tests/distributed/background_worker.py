"""What the ranks of test_background.py do; started by torchrun, writes its findings as JSON.

Usage: background_worker.py TASK FOLDER OUTPUT
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from divided_worker import SPARSE, placed
from worker import make_engine, resumed_from, steps

from mltfr_dist.config import RunConfig
from mltfr_dist.distributed import checkpoint, rank_files, saving
from mltfr_dist.distributed.checkpoint import MODEL, Progress, partial_of, step_folder
from mltfr_dist.distributed.meeting import leave, start_ranks, stop_ranks
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.distributed.saver import Saver
from mltfr_dist.errors import MltfrError, OtherRankError

VARIANTS: dict[str, tuple[str, int, dict[str, object]]] = {
    "rows, sparse": ("rows", 3, SPARSE),
    "rows, dense": ("rows", 1, {}),
    "replicated, sparse": ("replicated", 2, SPARSE),
    "replicated": ("replicated", 0, {}),
}
"""Placement, ZeRO stage and settings."""


def config_of(folder: Path, name: str) -> RunConfig:
    placement, stage, changes = VARIANTS[name]
    return placed(folder, placement, stage, changes)


@contextmanager
def slow_disk(of: bool) -> Iterator[threading.Event]:
    """Threads write nothing before the event is set; ``of`` this rank alone."""
    may_go_on, write = threading.Event(), rank_files.write_tensors

    def waits(*arguments: Any) -> str:
        may_go_on.wait()
        return write(*arguments)

    if of:
        rank_files.write_tensors = waits
    try:
        yield may_go_on
    finally:
        may_go_on.set()
        rank_files.write_tensors = write


def written(folder: Path, ranks: Ranks) -> dict[str, list[float]]:
    """Losses of updates made while the disk of the last rank is slow, of an engine that saved
    before them and waited, and of one that goes on from what was written meanwhile.
    """
    result = {}
    for name in VARIANTS:
        config, progress = config_of(folder, name), Progress(stage="train", step=4)
        engine = make_engine(config, ranks)
        steps(engine, config, ranks, 0, 4)
        saving.save(folder / f"{name} waited", engine, progress)
        place = folder / f"{name} meanwhile"
        writes = ranks.rank == (ranks.world_size - 1 if "rows" in name else 0)
        with Saver(engine, background=True) as saver, slow_disk(writes) as may_go_on:
            best = folder / f"{name} best"
            saver.save(best, progress, with_optimizer=False)
            saver.save(place, progress, then=(folder / f"{name} then").touch)
            result[f"{name} meanwhile"] = steps(engine, config, ranks, 4, 6)
            assert engine.verdict.writes, "all ranks know that one still writes"
            assert not place.exists()
            may_go_on.set()
            while engine.verdict.writes:
                steps(engine, config, ranks, 6, 7)
            assert not place.exists(), "complete is what rank 0 has given a header"
            saver.finish()
        ranks.barrier()
        assert (folder / f"{name} then").exists()
        assert checkpoint.read_header(best).progress.step == 4
        assert not partial_of(place).exists()
        engine.destroy()
        for kind in ("waited", "meanwhile"):
            result[f"{name} from {kind}"] = resumed_from(
                config, ranks, folder / f"{name} {kind}", 4, 6
            )
    a_full_disk_on_one_rank(folder, ranks)
    given_up(folder, ranks)
    return result


def a_full_disk_on_one_rank(folder: Path, ranks: Ranks) -> None:
    """All ranks say so when they meet next; what was saved before stays, and is followed."""
    config = config_of(folder, "rows, sparse")
    engine = make_engine(config, ranks)
    begun = {step: Progress(stage="train", step=step, skipped_steps=step) for step in range(1, 5)}
    place = step_folder(folder, begun[1])
    with Saver(engine, background=True) as saver:
        saver.save(place, begun[1])
        saver.finish()
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard if ranks.is_main else 500, hard))
        saver.save(step_folder(folder, begun[2]), begun[2])
        steps(engine, config, ranks, 0, 2)
        while engine.health.writes():
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        expected = (MltfrError, "File too large") if ranks.is_main else (OtherRankError, "")
        with pytest.raises(expected[0], match=expected[1]):
            saver.save(step_folder(folder, begun[3]), begun[3])
        ranks.barrier()
        assert not list(folder.glob(".partial-*"))
        assert not step_folder(folder, begun[2]).exists()
        checkpoint.verify_with_rows(place, MODEL)
        saver.save(step_folder(folder, begun[4]), begun[4])
        saver.finish()
        assert saving.progress_for_all(step_folder(folder, begun[4]), ranks).step == 4
    engine.destroy()


def given_up(folder: Path, ranks: Ranks) -> None:
    """An error leaves nothing behind of a save that runs."""
    engine = make_engine(config_of(folder, "rows, dense"), ranks)
    place = folder / "given up"
    progress = Progress(stage="train", step=1, skipped_steps=1)

    def fails() -> None:
        with slow_disk(True) as may_go_on, Saver(engine, background=True) as saver:
            saver.save(place, progress)
            threading.Timer(0.1, may_go_on.set).start()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    ranks.barrier()
    assert not place.exists()
    engine.destroy()


def killed(folder: Path, ranks: Ranks) -> None:
    """Save at step 3; die after step 6, while one rank has yet to write what it copied at step
    5.
    """
    config = config_of(folder, "rows, sparse")
    engine, place = make_engine(config, ranks), folder / "killed"
    saver = Saver(engine, background=True)
    steps(engine, config, ranks, 0, 3)
    saver.save(step_folder(place, at(3)), at(3))
    saver.finish()
    steps(engine, config, ranks, 3, 5)
    with slow_disk(not ranks.is_main):
        saver.save(step_folder(place, at(5)), at(5))
        while ranks.is_main and engine.health.writes():
            time.sleep(0.01)
        steps(engine, config, ranks, 5, 6)
        os.kill(os.getpid(), signal.SIGKILL)


def at(step: int) -> Progress:
    return Progress(stage="train", step=step)


def after(folder: Path, ranks: Ranks) -> dict[str, list[float]]:
    """Losses that go on from what :func:`killed` left, and those of a run that was not killed."""
    config = config_of(folder, "rows, sparse")
    engine = make_engine(config, ranks)
    whole = steps(engine, config, ranks, 0, 6)
    engine.destroy()
    return {
        "whole": whole[3:],
        "resumed": resumed_from(config, ranks, step_folder(folder / "killed", at(3)), 3, 6),
    }


if __name__ == "__main__":
    task, where, output = sys.argv[1:]
    all_ranks = start_ranks(1)
    result = {one.__name__: one for one in (written, killed, after)}[task](Path(where), all_ranks)
    if all_ranks.is_main:
        Path(output).write_text(json.dumps(result))
    stop_ranks()
    leave()
