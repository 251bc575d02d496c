"""An engine's state into checkpoints and back, at any ZeRO stage and world size, the item table
divided or not.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from torch import Tensor, nn

from mltfr_dist.distributed.checkpoint import (
    MODEL,
    OPTIMIZER,
    Header,
    Progress,
    begin,
    finish,
    not_written,
    read,
    read_header,
    row_files,
    write,
)
from mltfr_dist.distributed.divided_files import (
    MODEL_ROWS,
    OPTIMIZER_ROWS,
    file_name,
    read_run,
    write_rows,
)
from mltfr_dist.distributed.divided_optimizer import DividedOptimizer
from mltfr_dist.distributed.engine import Engine
from mltfr_dist.distributed.item_division import RankDivision
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.distributed.sending import send_tensors, send_text
from mltfr_dist.distributed.state import (
    State,
    begin_optimizer_state,
    restore_masters,
    restore_optimizer_state,
    whole_optimizer_state,
    whole_parameters,
)
from mltfr_dist.errors import CheckpointError, MltfrError
from mltfr_dist.models.divided_rows import DividedRows, divided_rows

CHECKED_ELEMENTS = 1 << 20
"""Numbers looked at together, so that a check needs no memory of a tensor's size."""


def save(folder: Path, engine: Engine, progress: Progress, *, with_optimizer: bool = True) -> None:
    """Write a checkpoint to ``folder``, replacing one of that name. All ranks must call.

    Rank 0 writes it; of a divided item table each rank its own rows.

    Raises:
        CheckpointError: A tensor is not finite: what was saved before must not be superseded by it.
    """
    tensors = {MODEL: whole_parameters(engine)}
    if with_optimizer:
        if progress.step == progress.skipped_steps:  # no update yet, so the optimizer has no state
            begin_optimizer_state(engine)
        tensors[OPTIMIZER] = whole_optimizer_state(engine)
    own = own_rows(engine, with_optimizer=with_optimizer)
    damaged = nonfinite(tensors | own, engine.ranks)
    if damaged:
        raise engine.ranks.rank0_raises(
            CheckpointError(
                f"Not saved at step {progress.step} of stage `{progress.stage}`: "
                f"{', '.join(damaged)} "
                f"{'is' if len(damaged) == 1 else 'are'} not finite.",
                rule="A checkpoint holds finite numbers; those saved before are kept.",
                remedy="Lower optimizer.learning_rate or set optimizer.max_grad_norm.",
            )
        )
    if own:
        write_divided(folder, tensors, own, progress, engine.ranks)
    else:
        engine.ranks.on_rank0(lambda heartbeat: write(folder, tensors, progress, heartbeat))


def own_rows(engine: Engine, *, with_optimizer: bool) -> dict[str, State]:
    """This rank's rows of a divided item table, by kind of file and name; nothing where it is
    whole.
    """
    rows = engine.row_adam
    if not isinstance(rows, DividedOptimizer):
        return {}
    own: dict[str, State] = {MODEL_ROWS: {rows.name: rows.rows.weight}}
    if with_optimizer:
        own[OPTIMIZER_ROWS] = {f"{rows.name}/{key}": t for key, t in rows.moments.items()}
    return own


def write_divided(
    folder: Path,
    tensors: dict[str, State],
    own: dict[str, State],
    progress: Progress,
    ranks: Ranks,
) -> None:
    """Every rank writes its own rows at once, and when all are there rank 0 the rest. All ranks
    must call.

    Raises:
        CheckpointError: A disk does not take it; the checkpoints before are as they were.
    """
    started = ranks.on_rank0(lambda _: begin(folder))
    partial = folder.with_name(ranks.from_main(started.name if started else ""))

    def write_own() -> dict[str, str]:
        hashes = {}
        for kind, state in own.items():
            name = file_name(kind, ranks.rank, ranks.world_size)
            try:
                hashes[name] = write_rows(partial / name, state)
            except OSError as error:
                raise not_written(folder, error) from error
        return hashes

    try:
        found = ranks.texts(json.dumps(ranks.jointly(write_own)))
    except MltfrError:
        if ranks.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    hashes = {name: digest for text in found for name, digest in json.loads(text).items()}
    ranks.on_rank0(lambda heartbeat: finish(folder, partial, tensors, progress, heartbeat, hashes))


def nonfinite(tensors: dict[str, dict[str, Tensor]], ranks: Ranks) -> list[str]:
    """Names of the tensors that are not finite on some rank, each looked at in parts. All ranks
    must call.
    """
    named = [(name, t) for state in tensors.values() for name, t in state.items()]
    found = [
        any(not torch.isfinite(part).all() for part in torch.split(t.flatten(), CHECKED_ELEMENTS))
        for _, t in named
    ]
    return [
        name
        for (name, _), bad in zip(
            named, ranks.max(torch.tensor(found).float()).tolist(), strict=True
        )
        if bad
    ]


def read_for_all(
    folder: Path, ranks: Ranks, name: str = MODEL, *, with_rows: bool = True
) -> dict[str, Tensor]:
    """:func:`read` on rank 0, which sends what it has read to the others. All ranks must call.

    Raises:
        DamagedError: The file is missing or its content is not what was written.
    """
    return send_tensors(
        ranks.on_rank0(lambda heartbeat: read(folder, name, heartbeat, with_rows=with_rows)), ranks
    )


def header_for_all(folder: Path, ranks: Ranks) -> Header:
    """The header of a checkpoint, as rank 0 reads it. All ranks must call.

    Raises:
        DamagedError: It is missing or unreadable.
    """
    header = ranks.on_rank0(lambda _: read_header(folder))
    return Header.model_validate_json(
        send_text(header.model_dump_json() if header else None, ranks)
    )


def progress_for_all(folder: Path, ranks: Ranks) -> Progress:
    """Where the checkpoint ``folder`` stands: see :func:`header_for_all`."""
    return header_for_all(folder, ranks).progress


def read_weights(model: nn.Module, folder: Path, ranks: Ranks) -> State:
    """What ``model`` is to load of a checkpoint; rows of a divided item table it has then. All
    ranks must call.

    Raises:
        DamagedError: A file is missing or its content is not what was written.
    """
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, DividedRows)]
    state = read_for_all(folder, ranks, with_rows=not found)
    for name, rows in found:
        restore_rows(folder, MODEL, f"{name}.weight", rows, rows.weight, state, ranks)
    return state


def restore_rows(
    folder: Path, file: str, name: str, rows: DividedRows, into: Tensor, state: State, ranks: Ranks
) -> None:
    """Set this rank's rows ``into`` [O, D] of the tensor ``name``, from ``state`` where it has the
    whole. All ranks must call.
    """
    assert isinstance(rows.division, RankDivision)
    division, files = rows.division, row_files(header_for_all(folder, ranks), file)
    if name in state:
        into.copy_(state[name][division.own_ids.cpu()])
        return
    ranks.jointly(lambda: read_run(folder, files, name, division.layout, division.first, into))


@torch.no_grad()
def restore_optimizer(folder: Path, engine: Engine) -> None:
    """Bring a fresh engine, whose module was loaded from ``folder``, to the checkpoint's state. All
    ranks must call.
    """
    ranks, whole = engine.ranks, divided_rows(engine.module) is None
    restore_masters(engine, read_for_all(folder, ranks, with_rows=whole))
    progress = header_for_all(folder, ranks).progress
    state = read_for_all(folder, ranks, OPTIMIZER, with_rows=whole)
    restore_optimizer_state(engine, state, progress.step - progress.skipped_steps)
    rows = engine.row_adam
    if isinstance(rows, DividedOptimizer):
        for key, moment in rows.moments.items():
            name = f"{rows.name}/{key}"
            restore_rows(folder, OPTIMIZER, name, rows.rows, moment, state, ranks)
