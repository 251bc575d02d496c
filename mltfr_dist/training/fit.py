"""A run: everything checked, then its baselines and its model (stages.py), then the report."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from mltfr_dist.config import RunConfig
from mltfr_dist.data.manifest import verify_folder
from mltfr_dist.distributed import checkpoint
from mltfr_dist.distributed.engine import deepspeed_config, make_part, versions
from mltfr_dist.distributed.placement import check_placement
from mltfr_dist.distributed.ranks import Ranks, lost_ranks_told, start_ranks
from mltfr_dist.distributed.signals import stop_signals
from mltfr_dist.distributed.watchdog import watched
from mltfr_dist.errors import DamagedError
from mltfr_dist.files import file_sha256, with_packaged
from mltfr_dist.training import report
from mltfr_dist.training.compare import baseline_result
from mltfr_dist.training.inputs import (
    Inputs,
    check_division,
    leave_out_bad_shards,
    load_inputs,
    record_inputs,
    train_stream,
)
from mltfr_dist.training.run_folder import CHECKPOINTS, Result, claim, leaf_values
from mltfr_dist.training.stages import fit_model


def fit(
    config: RunConfig, *, resume: bool = True, verify: bool = True, read_test: bool = True
) -> list[Result]:
    """Train and compare as ``config`` says; all ranks must call.

    Everything that can be checked is checked first, on all ranks, before anything is written. A run that was
    interrupted goes on from its last checkpoint; one that is finished is only reported.

    Args:
        config: The run.
        resume: Whether a run that was begun goes on; otherwise it is refused.
        verify: Whether data and tables are compared with their recorded hashes; False where the caller has done so.
        read_test: False leaves the test split unread and report.md unwritten, as a trial of a sweep does; the same run
            started again with True reads it then.

    Returns:
        Outcomes in the report's order, the configured model last.

    Raises:
        MltfrError: Bad input, or the run was asked to stop, or lost a rank.
    """
    ranks = start_ranks(config.training.threads, config.training.hang_seconds)
    with watched(ranks.rank, config.training.hang_seconds), stop_signals(), lost_ranks_told():
        config = leave_out_bad_shards(config, ranks)
        inputs = check_all(config, ranks, resume=resume, verify=verify)
        return run(config, inputs, ranks, read_test=read_test)


def check_all(config: RunConfig, ranks: Ranks, *, resume: bool, verify: bool) -> Inputs:
    """Check what can be checked before any work, the ranks against each other too, and make the run's folder.

    Raises:
        MltfrError: Bad input; nothing was written.
    """
    same_everywhere(config, ranks)

    def check() -> Inputs:
        inputs = load_inputs(config, verify=verify and ranks.is_first_of_node)
        part = make_part(config, ranks)
        zero_stage = deepspeed_config(config, part).get("zero_optimization", {}).get("stage", 0)
        check_division(config.mltfr, part, zero_stage)
        check_placement(config.mltfr, inputs.tables, ranks, zero_stage)
        train_stream(config, part)
        if verify and ranks.is_main:
            verify_folder(config.data.path, left_out=config.data.left_out)
        return inputs

    def take() -> None:
        if ranks.is_main:
            claim(config.folder, config, resume=resume)
            record_inputs(config.folder, inputs)
            check_checkpoints(config.folder)

    inputs = ranks.jointly(check)
    files = {f"`{name}`": digest for name, digest in inputs.hashes.items()} | {
        f"{config.deepspeed}": file_sha256(with_packaged(config.deepspeed))
    }
    ranks.agree(
        files,
        rule="Every node reads the same data, token tables and DeepSpeed file.",
        remedy="Copy them anew there.",
    )
    ranks.jointly(take)
    return inputs


def same_everywhere(config: RunConfig, ranks: Ranks) -> None:
    """Compare code and configuration between ranks.

    Raises:
        ConfigError: They differ.
    """
    rule = "All ranks of a run execute one program with one configuration."
    ranks.agree(
        versions(),
        rule=rule,
        remedy="Install the same release on every node, or share one environment.",
    )
    leaves = {f"`{path}`": str(value) for path, value in leaf_values(config).items()}
    ranks.agree(
        leaves, rule=rule, remedy="Start every rank with the same preset, file and overrides."
    )


def run(config: RunConfig, inputs: Inputs, ranks: Ranks, *, read_test: bool) -> list[Result]:
    """Train and compare; the outcomes in the report's order."""
    ranks.say(report.opening(config, inputs, ranks))
    results = [
        compare(name, config, inputs, ranks, read_test=read_test) for name in config.baselines
    ]
    results.append(fit_model(config, inputs, ranks, read_test=read_test))
    if ranks.is_main and read_test:
        report.write(config, inputs, results)
        print(report.closing(config, results), flush=True)
    ranks.barrier()
    return results


def check_checkpoints(folder: Path) -> None:
    """Refuse a run whose checkpoints another release wrote, before any work.

    Raises:
        CheckpointError: A header is of another schema version.
    """
    for header in (folder / CHECKPOINTS).glob(f"*/{checkpoint.HEADER}"):
        with suppress(DamagedError):  # skipped when its turn comes
            checkpoint.read_header(header.parent)


def compare(
    name: str, config: RunConfig, inputs: Inputs, ranks: Ranks, *, read_test: bool
) -> Result:
    """A baseline's outcome."""
    if name == "backbone":
        bare = bare_config(config)
        if ranks.is_main:
            claim(bare.folder, bare, resume=True)
            record_inputs(bare.folder, Inputs(inputs.manifest, (), inputs.hashes))
        ranks.barrier()
        return fit_model(
            bare, Inputs(inputs.manifest, (), inputs.hashes), ranks, read_test=read_test
        )
    return baseline_result(name, config, inputs.manifest, ranks, read_test=read_test)


def bare_config(config: RunConfig) -> RunConfig:
    """The same run without MLTFR, with the epochs of both stages, in a folder inside the run's."""
    training = config.training
    if config.mltfr.consensus.enabled:
        training = training.model_copy(
            update={"epochs": training.epochs + training.consensus_epochs}
        )
    mltfr = config.mltfr.model_copy(update={"enabled": False})
    return config.model_copy(
        update={
            "name": "backbone",
            "runs_dir": config.folder,
            "mltfr": mltfr,
            "training": training,
            "baselines": (),
        }
    )
