"""What a run reads, checked before any work and recorded."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from mltfr_dist.config import RunConfig
from mltfr_dist.data.shards.manifest import (
    MANIFEST_NAME,
    Manifest,
    all_shards,
    load_manifest,
    read_manifest,
    verify_maps,
)
from mltfr_dist.data.shards.quarantine import find_bad_shards, loss_report
from mltfr_dist.data.shards.retry import RetryPolicy
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.errors import CheckpointError, DataError
from mltfr_dist.files import file_sha256, write_atomically
from mltfr_dist.presets import PREPARATIONS
from mltfr_dist.schema import changed
from mltfr_dist.tables.content import with_content
from mltfr_dist.tables.seeds import seed_tables
from mltfr_dist.tables.store import TokenTable, load_table
from mltfr_dist.training.checks import check_tables
from mltfr_dist.training.items import item_features
from mltfr_dist.training.run_folder import CHECKPOINTS, INPUTS


@dataclass(frozen=True)
class Inputs:
    """Prepared data and token tables of a run."""

    manifest: Manifest
    tables: tuple[TokenTable, ...]
    hashes: dict[str, str]
    """sha256 of the manifest and of each table, by name."""
    item_features: torch.Tensor | None = None
    """[num_items + 1, C] what the tables give each item, where item tokens are on."""

    @property
    def table_names(self) -> tuple[str, ...]:
        """Names of the tables in the order of the experts."""
        return tuple(table.name for table in self.tables)


def load_inputs(config: RunConfig, *, verify: bool = True) -> Inputs:
    """Read and check the manifest and the token tables of a run.

    Args:
        config: The run.
        verify: Compare the tables' files, and the maps of users and items, with their recorded
            hashes, which reads them whole.

    Raises:
        DataError: Missing or damaged data or tables.
        ConfigError: Tables and filter, or data and item tokens, that do not go together.
    """
    path = config.data.path
    if path in PREPARATIONS and not path.exists():
        raise DataError(
            f"The data of this preset, {path}, is not here.",
            rule="Public sets are not part of the program.",
            remedy=PREPARATIONS[path],
        )
    manifest = load_manifest(path, left_out=config.data.left_out)
    if verify:
        verify_maps(path, manifest)
    stored = (
        tuple(load_table(path, verify=verify) for path in config.mltfr.tables)
        if config.mltfr.enabled
        else ()
    )
    tables = tuple(
        with_content(table, config.mltfr.table_content, config.training.seed) for table in stored
    )
    features = item_features(config, tables)
    if config.mltfr.filter.strategy == "seed_words" and tables:
        tables = seed_tables(tables, config.mltfr.filter)
    check_tables(config, tables)
    hashes = {"data": file_sha256(config.data.path / MANIFEST_NAME)} | {
        table.name: table.sha256 for table in tables
    }
    return Inputs(manifest, tables, hashes, features)


def leave_out_bad_shards(config: RunConfig, ranks: Ranks) -> RunConfig:
    """With `data.on_bad_shard=quarantine`: the run without every shard that any rank finds bad; all
    ranks must call.

    Raises:
        DataError: No manifest, or a split of which nothing would remain.
    """
    if config.data.on_bad_shard == "stop":
        return config
    folder, error, vector = config.data.path, None, torch.zeros(0)
    try:
        manifest = read_manifest(folder)
        bad = find_bad_shards(
            folder, manifest, RetryPolicy(config.data.read_attempts, config.data.read_timeout)
        )
        files = [shard.file for shard in all_shards(manifest)]
        vector = torch.tensor(
            [float(file in bad or file in config.data.left_out) for file in files]
        )
    except DataError as caught:
        error = caught
    ranks.first_error(error)
    left_out = {
        f: bad.get(f, "as another rank or the configuration says")
        for f, on in zip(files, ranks.max(vector))
        if on
    }
    if left_out:
        ranks.say(loss_report(folder, manifest, left_out))
    return changed(config, {"data.left_out": sorted(left_out)}, source="data.on_bad_shard")


def record_inputs(folder: Path, inputs: Inputs) -> None:
    """Note the hashes of what a run reads; when it goes on, they must be the same.

    The manifest's hash stands for all prepared files: it holds theirs, which readers compare.

    Raises:
        CheckpointError: The data or a table has changed since, or a run with checkpoints has lost
            its record.
    """
    if (folder / INPUTS).exists() or any((folder / CHECKPOINTS).glob("*")):
        check_recorded(folder, inputs)
        return
    write_atomically(folder / INPUTS, json.dumps(inputs.hashes, indent=2) + "\n")


def check_recorded(folder: Path, inputs: Inputs) -> None:
    """Compare what is there with what the run in ``folder`` noted when it began.

    Raises:
        CheckpointError: The data or a table has changed since, or nothing was noted.
    """
    path = folder / INPUTS
    rule = "A run's numbers belong to the data and tables whose sha256 it recorded."
    try:
        recorded = json.loads(path.read_text())
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(path.stat().st_mtime))
        changed = [
            f"{name} changed (sha256 {str(recorded.get(name))[:12]} then, {digest[:12]} now)"
            for name, digest in inputs.hashes.items()
            if recorded.get(name) != digest
        ]
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"The run {folder} cannot be compared with its inputs: {path} is missing or damaged "
            f"({error}).",
            rule=rule,
            remedy=f"Restore {path.name} from a copy of the run, "
            "or train again under another `name`.",
        ) from None
    if changed:
        raise CheckpointError(
            f"The run {folder} was made from other inputs; since it began on {began}: "
            f"{', '.join(changed)}.",
            rule=rule,
            remedy="Restore them from a copy, or train again under another `name`.",
        )
