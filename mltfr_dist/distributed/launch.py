"""What a launcher told this process: deepspeed and torchrun set RANK and its kin, `srun` sets
SLURM_PROCID and its kin.
"""

from __future__ import annotations

import math
import os
import re

from mltfr_dist.errors import ConfigError, OtherRankError

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

SLURM_TASKS = "SLURM_STEP_NUM_TASKS"
"""Set in the tasks of `srun` alone, not in a batch script."""


def is_launched() -> bool:
    """Whether a launcher started this process; the tasks of `srun` get RANK and its kin from
    SLURM_*.

    Raises:
        ConfigError: The environment is incomplete or contradicts itself.
        OtherRankError: It is incomplete, on a rank that is not the first: one speaks.
    """
    check_numbers()
    if SLURM_TASKS in os.environ:
        adopt_slurm_task()
    given = [name for name in LAUNCHER_VARIABLES if name in os.environ]
    launched = "RANK" in given and "WORLD_SIZE" in given
    if launched and len(given) < len(LAUNCHER_VARIABLES):
        missing = sorted(set(LAUNCHER_VARIABLES) - set(given))
        _refuse(
            int(os.environ["RANK"]),
            f"The environment sets {', '.join(given)} but not {', '.join(missing)}.",
            rule="A launched process needs all of them.",
            remedy="Start with deepspeed or torchrun, or unset RANK and WORLD_SIZE for one "
            "process.",
        )
    return launched


def expected_rank() -> int:
    """The rank that this process will have, before anything is checked: 0 where it was not
    launched.
    """
    texts = [os.environ[name] for name in ("RANK", "SLURM_PROCID") if name in os.environ]
    return int(texts[0]) if texts and texts[0].isdecimal() else 0


def check_numbers() -> None:
    """Whether what is set can be a rank among others.

    Raises:
        ConfigError: It is no number, or a rank beyond the last: it would wait for the others until
            it gives up.
    """
    given = {
        name: os.environ[name]
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
        if name in os.environ
    }
    numbers = {name: int(text) for name, text in given.items() if text.isdecimal()}
    if len(numbers) < len(given) or numbers.get("RANK", 0) >= numbers.get("WORLD_SIZE", math.inf):
        raise ConfigError(
            f"The environment says {', '.join(f'{name}={text}' for name, text in given.items())}.",
            rule="All are whole numbers, and RANK lies below WORLD_SIZE.",
            remedy="Start with deepspeed or torchrun, or correct what you export.",
        )


def adopt_slurm_task() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_SIZE from SLURM_*; where they are set, compare.

    Raises:
        ConfigError: The step has several tasks and nothing says where they meet, or the two tell
            different stories, or Slurm's variables do among themselves.
        OtherRankError: The same, on a task that is not the first: one speaks.
    """
    tasks, task, local = (
        int(os.environ[name]) for name in (SLURM_TASKS, "SLURM_PROCID", "SLURM_LOCALID")
    )
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        one_each = world_size == tasks
        if world_size % tasks or (one_each and rank != task):
            _refuse(
                task,
                f"The environment says RANK={rank} of WORLD_SIZE={world_size}, "
                f"but Slurm SLURM_PROCID={task} of {SLURM_TASKS}={tasks}.",
                rule="A task of `srun` is one rank, or starts the same number of ranks as every "
                "other task.",
                remedy="Unset RANK and WORLD_SIZE so that they come from Slurm, or start one "
                "launcher a task "
                "(`--ntasks-per-node=1` with torchrun).",
            )
        return
    if tasks == 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        _refuse(
            task,
            f"`srun` started {tasks} tasks, but MASTER_ADDR or MASTER_PORT is not set.",
            rule="Ranks meet at MASTER_ADDR:MASTER_PORT, on the node of task 0.",
            remedy="Submit slurm/train.sbatch, which sets both, or export them before `srun`.",
        )
    per_node, node = os.environ["SLURM_STEP_TASKS_PER_NODE"], int(os.environ["SLURM_NODEID"])
    counts = tasks_of_nodes(per_node)
    if task >= tasks or sum(counts) != tasks or node >= len(counts) or local >= counts[node]:
        _refuse(
            task,
            f"Slurm's variables contradict each other: {SLURM_TASKS}={tasks}, "
            f"SLURM_STEP_TASKS_PER_NODE={per_node}, "
            f"SLURM_PROCID={task}, SLURM_NODEID={node}, SLURM_LOCALID={local}.",
            rule="The tasks of all nodes together are those of the step, and a task is one of its "
            "node.",
            remedy="Unset those that were exported by hand: `srun` sets them itself.",
        )
    local_size = counts[node]
    os.environ.update(
        RANK=str(task), WORLD_SIZE=str(tasks), LOCAL_RANK=str(local), LOCAL_SIZE=str(local_size)
    )


def _refuse(task: int, what: str, *, rule: str, remedy: str) -> None:
    if task:
        raise OtherRankError("Rank 0 says why.", remedy="See its message.")
    raise ConfigError(what, rule=rule, remedy=remedy)


def tasks_of_nodes(tasks_per_node: str) -> list[int]:
    """Tasks on each node of a step, which Slurm writes as "4(x2),1" for 4, 4, 1."""
    counts = []
    for tasks, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks_per_node):
        counts += [int(tasks)] * int(repeats or 1)
    return counts
