"""Small real inputs for tests, and real multi-process launches."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mltfr_dist.config import (
    BackboneConfig,
    LossConfig,
    MLTFRConfig,
    PrepareConfig,
    PublishedConfig,
    RunConfig,
    TableConfig,
)
from mltfr_dist.data.prepare.run import prepare
from mltfr_dist.models.mltfr import MLTFR
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.published.components import published_components, published_table
from mltfr_dist.resolve import merge_values
from mltfr_dist.schema import nested, validate
from mltfr_dist.spec import ModelSpec
from mltfr_dist.tables.store import save_table

REPOSITORY = Path(__file__).resolve().parent.parent


def write_data(
    folder: Path, *, num_users: int = 120, num_items: int = 40, longest: int = 14, seed: int = 0
) -> Path:
    """Prepared interactions with something to learn: an item is followed by its successor more
    often than not.
    """
    rng = np.random.default_rng(seed)
    lines = []
    for user in range(num_users):
        item = int(rng.integers(num_items))
        items = []
        for _ in range(int(rng.integers(4, longest))):
            items.append(f"i{item}")
            item = (item + 1) % num_items if rng.random() < 0.7 else int(rng.integers(num_items))
        lines.append(" ".join([f"u{user}", *items]))
    source = folder / "interactions.txt"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text("\n".join(lines) + "\n")
    titles = (
        folder / "titles.csv"
    )  # item 5 has none; the others are named by tokens of `write_table`
    titles.write_text(
        "item_id,title\n"
        + "".join(f"i{i},first-{i} second-{i % 7}\n" for i in range(num_items) if i != 5)
    )
    config = PrepareConfig(
        format="sequences",
        titles=titles,
        user_core=1,
        item_core=1,
        sequences_per_block=16,
        sequences_per_shard=32,
    )
    prepare(str(source), folder / "data", config, log=lambda _: None)
    return folder / "data"


def write_periods(folder: Path, name: str, *, targets: str) -> list[tuple[str, str, int]]:
    """Random interactions of 40 users with 30 items, one a moment, who take items again, prepared
    with cuts at 700 and 850 of a thousand.

    Returns:
        user, item, time of each.
    """
    draws = np.random.default_rng(0)
    rows = [
        (f"u{draws.integers(40):02}", f"i{draws.integers(30):02}", time) for time in range(1000)
    ]
    source = folder / "periods.csv"
    lines = [f"{user},{item},{time}\n" for user, item, time in rows]
    source.write_text("user_id,item_id,timestamp\n" + "".join(lines))
    config = PrepareConfig(
        user_core=1,
        item_core=1,
        split="global_temporal",
        targets=targets,
        valid_fraction=0.15,
        test_fraction=0.15,
        sequences_per_shard=7,
        sequences_per_block=3,
    )
    prepare(str(source), folder / name, config, log=lambda _: None)
    return rows


def write_table(
    folder: Path, name: str, *, num_rows: int, dim: int, seed: int, num_distinct: int | None = None
) -> Path:
    """A stored token table of random rows; those after the first ``num_distinct`` repeat them in
    turn.
    """
    rows = torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(seed))
    rows = rows[torch.arange(num_rows) % (num_distinct or num_rows)]
    described: dict[str, Any] = {
        "source_files": ("random",),
        "source_sha256": "0" * 64,
        "tensor": "random",
        "source_dtype": "F32",
        "source_rows": num_rows,
        "vocabulary_file": "random",
        "licence": None,
        "dropped": {},
        "mean_cosine_before": 0.0,
        "mean_cosine_after": 0.0,
        "config": TableConfig(),
    }
    save_table(folder, rows, [f" {name}-{i}" for i in range(num_rows)], name=name, **described)
    return folder / name


def tiny_config(folder: Path, **changes: Any) -> RunConfig:
    """A complete run over small data and two random tables, written under ``folder`` where they are
    not there yet.

    Args:
        folder: Where inputs and runs go.
        changes: Dotted keys with `.` written as `__`, such as ``training__seed=1``.
    """
    if not (folder / "data").exists():
        write_data(folder)
        write_table(folder / "tables", "first", num_rows=90, dim=12, seed=1)
        write_table(folder / "tables", "second", num_rows=70, dim=20, seed=2)
    values: dict[str, Any] = {
        "name": "tiny",
        "runs_dir": str(folder / "runs"),
        "data": {"path": str(folder / "data"), "max_len": 10, "shuffle_shards": 2},
        "backbone": {"hidden_dim": 16, "num_heads": 2},
        "mltfr": {
            "tables": [str(folder / "tables" / "first"), str(folder / "tables" / "second")],
            "filter": {
                "top_k": 4,
                "query_every": 2,
                "shortlist_size": 40,
                "shortlist_refresh_steps": 4,
            },
            "expert": {"num_heads": 2, "head_dim": 4},
            "consensus": {"fisher_sequences": 50},
        },
        "training": {
            "global_batch_size": 32,
            "epochs": 3,
            "consensus_epochs": 2,
            "log_every_steps": 1,
            "threads": 1,
        },
        "evaluation": {"batch_size": 50},
        "deepspeed": str(REPOSITORY / "ds_configs" / "zero1.json"),
    }
    given = nested({key.replace("__", "."): value for key, value in changes.items()})
    return validate(RunConfig, merge_values(values, given), source="a test")


def clean_environment(**more: str) -> dict[str, str]:
    """The environment without any launcher's variables."""
    names = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
    )
    kept = {k: v for k, v in os.environ.items() if k not in names}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)} | more


def torchrun(num_ranks: int, script: Path, *arguments: str) -> list[str]:
    """The command that starts ``script`` on ``num_ranks`` processes; torchrun finds a free port
    itself.
    """
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={num_ranks}",
    ]
    return [*launcher, str(script), *arguments]


def run_ranks(num_ranks: int, script: Path, *arguments: str, timeout: int = 240) -> str:
    """Run ``script`` on real processes to its end; returns what it printed, and fails the test if
    it failed.
    """
    command = torchrun(num_ranks, script, *arguments)
    done = subprocess.run(
        command,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=REPOSITORY,
    )
    assert done.returncode == 0, (
        f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    )
    return done.stdout


def findings(worker: Path, task: str, folder: Path, num_ranks: int) -> Any:
    """What ``task`` of a worker script found on so many real ranks; it writes JSON."""
    output = folder / f"{task}-{num_ranks}.json"
    run_ranks(num_ranks, worker, task, str(folder), str(output))
    return json.loads(output.read_text())


def relative_difference(first: list[float], second: list[float]) -> float:
    """The largest of |a - b| / |a|."""
    assert len(first) == len(second) > 0
    return max(abs(a - b) / abs(a) for a, b in zip(first, second, strict=True))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def missing_for_slurm() -> str:
    """Why the tests of Slurm cannot run here; empty where they can."""
    missing = [
        program
        for program in ("slurmctld", "slurmd", "sbatch", "munged")
        if shutil.which(program) is None
    ]
    if missing:
        return f"Slurm needs `apt-get install slurm-wlm munge` (no {', '.join(missing)} here)"
    return "" if os.geteuid() == 0 else "Slurm needs root to be started"


def missing_for_nodes() -> str:
    """Why the tests of several hosts cannot run here; empty where they may."""
    if shutil.which("ip") is None:
        return "network namespaces need `apt-get install iproute2`"
    return "" if os.geteuid() == 0 else "network namespaces need root"


def new_model(
    backbone: BackboneConfig,
    mltfr: MLTFRConfig,
    loss: LossConfig,
    *,
    num_items: int,
    max_len: int,
    table_rows: Sequence[torch.Tensor],
    item_features: torch.Tensor | None = None,
    has_consensus: bool = False,
    published: PublishedConfig | None = None,
) -> Recommender:
    """A freshly initialised model over tables in memory."""
    names = tuple(str(m) for m in range(len(table_rows)))
    spec = ModelSpec(
        backbone=backbone,
        mltfr=mltfr,
        loss=loss,
        published=published or PublishedConfig(),
        num_items=num_items,
        max_len=max_len,
        tables=names,
        has_consensus=has_consensus,
    )
    return spec.build(dict(zip(names, table_rows, strict=True)), item_features)


def with_loss(model: Recommender, loss: LossConfig) -> Recommender:
    """The same backbone and MLTFR, trained by another loss."""
    return Recommender(model.backbone, model.mltfr, loss, num_items=model.num_items)


def new_mltfr(
    config: MLTFRConfig,
    hidden_dim: int,
    table_rows: Sequence[torch.Tensor],
    published: PublishedConfig | None = None,
) -> MLTFR:
    """MLTFR alone, over tables in memory."""
    defects = published or PublishedConfig()
    tables = [published_table(defects)(rows) for rows in table_rows]
    return MLTFR(config, hidden_dim, tables, published_components(config, defects))
