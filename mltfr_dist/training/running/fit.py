"""A run: everything checked, then its baselines and its model (stages.py), then the report."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch

from mltfr_dist.config import RunConfig
from mltfr_dist.config.published import MLTFR, without
from mltfr_dist.data.shards.manifest import verify_folder
from mltfr_dist.distributed import checkpoint
from mltfr_dist.distributed.deepspeed_file import deepspeed_config, sharding_file, zero_stage
from mltfr_dist.distributed.engine import batch_layout
from mltfr_dist.distributed.health import watch_neighbours
from mltfr_dist.distributed.item_placement import check_items_divide, resolve_items
from mltfr_dist.distributed.launch import expected_rank
from mltfr_dist.distributed.lock import Lock, acquire
from mltfr_dist.distributed.meeting import lost_ranks_told, start_ranks
from mltfr_dist.distributed.placement import check_placement
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.distributed.signals import stop_signals
from mltfr_dist.distributed.watchdog import watched
from mltfr_dist.errors import CheckpointError, ConfigError, DamagedError, StoppedError
from mltfr_dist.files import file_sha256, with_packaged
from mltfr_dist.progress import say
from mltfr_dist.published.checks import check_division
from mltfr_dist.schema import changed
from mltfr_dist.startup import started
from mltfr_dist.training.evaluating.compare import baseline_result
from mltfr_dist.training.inputs import Inputs, leave_out_bad_shards, load_inputs, record_inputs
from mltfr_dist.training.reporting import report
from mltfr_dist.training.reporting.services import check_services
from mltfr_dist.training.run_folder import (
    CHECKPOINTS,
    Result,
    check_claim,
    claim,
    has_run,
    load_result,
)
from mltfr_dist.training.running.agreement import same_everywhere
from mltfr_dist.training.running.stages import fit_model
from mltfr_dist.training.streams import train_stream

SEEN_SECONDS = 60
"""How long a run's folder may take to be seen on another node."""


def fit(
    config: RunConfig,
    *,
    resume: bool = True,
    verify: bool = True,
    read_test: bool = True,
    watch: bool = True,
) -> list[Result]:
    """Train and compare as ``config`` says; all ranks must call.

    Everything that can be checked is checked first, on all ranks, before anything is written. A run
    that was interrupted goes on from its last checkpoint; one that is finished is only reported.

    Args:
        config: The run.
        resume: Whether a run that was begun goes on; otherwise it is refused.
        verify: Whether data and tables are compared with their recorded hashes; False where the
            caller has done so.
        read_test: False leaves the test split unread and report.md unwritten, as a trial of a sweep
            does; the same run started again with True reads it then.
        watch: Whether a hang ends this process; a program that only uses this one may not want to.

    Returns:
        Outcomes in the report's order, the configured model last.

    Raises:
        MltfrError: Bad input, or the run was asked to stop, or lost a rank.
    """
    watchdog = watched(expected_rank(), config.training.hang_seconds) if watch else nullcontext()
    with watchdog, lost_ranks_told():
        ranks = start_ranks(config.training.threads)
        watch_neighbours(ranks)
        with stop_signals():
            config = leave_out_bad_shards(config, ranks)
            inputs = check_all(config, ranks, verify=verify)
            with held_folder(config, inputs, ranks, resume=resume):
                say_where(config, ranks)
                try:
                    return run(config, inputs, ranks, read_test=read_test)
                except StoppedError as error:
                    raise ranks.rank0_raises(error) from None


def check_all(config: RunConfig, ranks: Ranks, *, verify: bool) -> Inputs:
    """Check what can be checked before any work, the ranks against each other too.

    Raises:
        MltfrError: Bad input; nothing was written.
    """
    same_everywhere(config, ranks)

    def check() -> Inputs:
        inputs = load_inputs(config, verify=verify and ranks.is_first_of_node)
        layout = batch_layout(config, ranks)
        stage = zero_stage(deepspeed_config(config, layout, inputs.manifest.num_items))
        check_division(config.published, layout.world_size, layout.grad_accum_steps, stage)
        check_placement(config, inputs.tables, ranks, stage)
        check_items_divide(config, inputs.manifest.num_items, ranks)
        train_stream(config, layout)
        if ranks.is_main:
            check_services(config)
        if verify and ranks.is_main:
            verify_folder(config.data.path, left_out=config.data.left_out)
        return inputs

    inputs = ranks.jointly(check)
    sharding = sharding_file(config, ranks.world_size, inputs.manifest.num_items)
    files = {f"`{name}`": digest for name, digest in inputs.hashes.items()}
    files[f"{sharding}"] = file_sha256(with_packaged(sharding))
    ranks.agree(
        files,
        rule="Every node reads the same data, token tables and DeepSpeed file.",
        remedy="Copy them anew there.",
    )
    return inputs


@contextmanager
def held_folder(config: RunConfig, inputs: Inputs, ranks: Ranks, *, resume: bool) -> Iterator[None]:
    """Make or take up the run's folder, and hold it alone until the end. All ranks must call.

    Raises:
        MltfrError: It holds something else, is held by another process, or is another node's.
    """
    check_place(config.folder, ranks)

    def take(heartbeat: Callable[[], object]) -> Lock:
        check_claim(config.folder, config, resume=resume)
        lock = acquire(config.folder, ranks.say, heartbeat)
        try:
            check_checkpoints(config, ranks)
            if has_run(config.folder):
                record_inputs(config.folder, inputs)  # compares, before anything is changed
            for changed in claim(config.folder, config, resume=resume):
                ranks.say(f"  another setting than before, which changes no number: {changed}")
            record_inputs(config.folder, inputs)
        except BaseException:
            lock.release()
            raise
        return lock

    lock = ranks.on_rank0(take)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def check_place(folder: Path, ranks: Ranks) -> None:
    """Refuse a run that only another rank sees: rank 0 would begin it anew. All ranks must call.

    Raises:
        ConfigError: Another rank sees it, and rank 0 does not.
    """
    sees = ranks.gather(torch.tensor([float(has_run(folder))]))[:, 0].tolist()
    host = ranks.texts(socket.gethostname())
    if not sees[0] and any(sees):
        there = sees.index(1.0)
        raise ranks.rank0_raises(
            ConfigError(
                f"Rank {there} on {host[there]} sees a run at {folder}, and rank 0 on {host[0]} "
                "sees none.",
                rule="Rank 0 alone writes a run's folder. Where `runs_dir` is each node's own "
                "disk, a run goes on only with its rank 0 on the node where it lies.",
                remedy=f"Start with {host[there]} as the first node, copy the folder to {host[0]}, "
                "set `runs_dir` to a folder that every node sees, or give this run another `name`.",
            )
        )


def say_where(config: RunConfig, ranks: Ranks) -> None:
    """Tell where the run lies if not every rank sees it. All ranks must call.

    Raises:
        ConfigError: The item table is divided, of which each rank writes its rows.
    """
    hosts, blind = ranks.texts(socket.gethostname()), blind_ranks(config.folder, ranks)
    waited, divided = 0, resolve_items(config, ranks) == "rows"
    while blind and divided and waited < SEEN_SECONDS:  # a network file system may take a while
        time.sleep(1)
        waited, blind = waited + 1, blind_ranks(config.folder, ranks)
    told = ", ".join(f"rank {rank} ({hosts[rank]})" for rank in blind)
    if blind and divided:
        raise ranks.rank0_raises(
            ConfigError(
                f"{config.folder} lies on {hosts[0]}, and {told} did not see it there.",
                rule="With item_table.placement=rows each rank writes and reads its own rows.",
                remedy="Set `runs_dir` to a folder that every node sees, or "
                "item_table.placement=replicated.",
            )
        )
    if blind:
        ranks.say(
            f"  {config.folder} lies on {hosts[0]}, and {told} did not see it there: if it is "
            f"that node's own disk, the run can only go on with its rank 0 on {hosts[0]}"
        )


def blind_ranks(folder: Path, ranks: Ranks) -> list[int]:
    """Ranks that see no run there. All ranks must call."""
    sees = ranks.gather(torch.tensor([float(has_run(folder))]))[:, 0].tolist()
    return [rank for rank, seen in enumerate(sees) if not seen]


def run(config: RunConfig, inputs: Inputs, ranks: Ranks, *, read_test: bool) -> list[Result]:
    """Train and compare; the outcomes in the report's order."""
    started()
    ranks.say(report.opening(config, inputs, ranks))
    results = [
        compare(name, config, inputs, ranks, read_test=read_test) for name in config.baselines
    ]
    results.append(fit_model(config, inputs, ranks, read_test=read_test))
    if ranks.is_main and read_test:
        report.write(config, inputs, results)
        say(report.closing(config, results))
    ranks.barrier()
    return results


def check_checkpoints(config: RunConfig, ranks: Ranks) -> None:
    """Refuse a run whose checkpoints another release wrote, before any work.

    Raises:
        CheckpointError: A header is of another schema, or the run would go on with other draws.
    """
    on_cpu = ranks.device.type == "cpu"
    of_mltfr = config.mltfr.enabled and config.mltfr.expert.dropout
    goes_on = (of_mltfr or (on_cpu and config.backbone.dropout)) and not load_result(config.folder)
    for file in (config.folder / CHECKPOINTS).glob(f"*/{checkpoint.HEADER}"):
        with suppress(DamagedError):  # skipped when its turn comes
            header = checkpoint.read_header(file.parent)
            if goes_on and not checkpoint.drawn_as_now(header.draws, on_cpu=on_cpu):
                raise CheckpointError(
                    f"{file.parent} was written by a release that draws dropout otherwise.",
                    rule="A run that goes on has the losses of one that was never interrupted.",
                    remedy="Go on with the mltfr_dist release that began the run, or train again "
                    "under another `name`.",
                )


def compare(
    name: str, config: RunConfig, inputs: Inputs, ranks: Ranks, *, read_test: bool
) -> Result:
    """A baseline's outcome."""
    if name == "backbone":
        bare, own = bare_config(config), Inputs(inputs.manifest, (), inputs.hashes)
        with held_folder(bare, own, ranks, resume=True):
            return fit_model(bare, own, ranks, read_test=read_test)
    ranks_file = config.folder / f"ranks-{name}.parquet"
    return baseline_result(
        name, config, inputs.manifest, ranks, read_test=read_test, ranks_file=ranks_file
    )


def bare_config(config: RunConfig) -> RunConfig:
    """The same run without MLTFR, with the epochs of both stages, in a folder inside the run's."""
    training, epochs = config.training, config.training.epochs
    if config.mltfr.consensus.enabled:
        epochs += training.consensus_epochs
    fields = {
        "name": "backbone",
        "runs_dir": config.folder,
        **without(MLTFR),
        "mltfr.enabled": False,
        "training.epochs": epochs,
        "baselines": (),
    }
    return changed(config, fields, source="the baseline `backbone`")
