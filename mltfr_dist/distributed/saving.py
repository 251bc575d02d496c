"""An engine's state into checkpoints and back, at any ZeRO stage and world size, the item table
divided or not.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from mltfr_dist.distributed.checkpoint import (
    MODEL,
    OPTIMIZER,
    Header,
    Progress,
    read,
    read_header,
    row_files,
    verify_with_rows,
)
from mltfr_dist.distributed.divided_files import read_run, send_rows
from mltfr_dist.distributed.divided_optimizer import DividedOptimizer
from mltfr_dist.distributed.engine import Engine
from mltfr_dist.distributed.item_division import RankDivision
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.distributed.row_adam import RowAdam
from mltfr_dist.distributed.saver import Saver
from mltfr_dist.distributed.sending import send_tensors, send_text
from mltfr_dist.distributed.state import State, restore_masters, restore_optimizer_state
from mltfr_dist.models.divided_rows import DividedRows


def save(folder: Path, engine: Engine, progress: Progress, *, with_optimizer: bool = True) -> None:
    """Write a checkpoint to ``folder``, replacing one of that name. All ranks must call.

    Raises:
        CheckpointError: See :meth:`Saver.save`.
    """
    with Saver(engine) as saver:
        saver.save(folder, progress, with_optimizer=with_optimizer)


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
    """What ``model`` is to load of a checkpoint; rows of an item table that was written divided it
    has then. All ranks must call.

    Raises:
        DamagedError: A file is missing or its content is not what was written.
    """
    state = read_for_all(folder, ranks, with_rows=False)
    divided = [(name, m) for name, m in model.named_modules() if isinstance(m, DividedRows)]
    for name, rows in divided:
        if isinstance(rows.division, RankDivision):
            restore_rows(folder, MODEL, f"{name}.weight", rows, rows.weight, state, ranks)
    if any(isinstance(rows.division, RankDivision) for _, rows in divided):
        return state
    ranks.on_rank0(lambda heartbeat: verify_with_rows(folder, MODEL, heartbeat))
    files, own = row_files(header_for_all(folder, ranks), MODEL), model.state_dict()
    for block in send_rows(folder, files, ranks) if not divided else ():
        table = own.get(block.name)
        if table is None or table.shape != block.shape:
            state[block.name] = block.rows  # which does not fit either, and is told when loaded
            continue
        table[block.ids.to(table.device)] = block.rows.to(table)
        state[block.name] = table  # loaded from itself
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
    ranks, rows = engine.ranks, engine.row_adam
    is_trained = rows is None  # the item table, as any parameter
    restore_masters(engine, read_for_all(folder, ranks, with_rows=is_trained))
    header = header_for_all(folder, ranks)
    state = read_for_all(folder, ranks, OPTIMIZER, with_rows=is_trained)
    updates = header.progress.step - header.progress.skipped_steps
    restore_optimizer_state(engine, state, updates)
    if isinstance(rows, RowAdam):
        for block in send_rows(folder, row_files(header, OPTIMIZER), ranks):
            rows.restore(block.name.removeprefix(f"{rows.name}/"), block.ids, block.rows)
    if isinstance(rows, DividedOptimizer):
        for key, moment in rows.moments.items():
            name = f"{rows.name}/{key}"
            restore_rows(folder, OPTIMIZER, name, rows.rows, moment, state, ranks)
