"""What a run reads, checked before any work, and the models that are built from it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mltfr_dist.config import FilterConfig, RunConfig
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
from mltfr_dist.data.stream.augment import ViewRatios
from mltfr_dist.data.stream.collate import Objective
from mltfr_dist.data.stream.ranking import RankingStream
from mltfr_dist.data.stream.training import BatchLayout, TrainStream
from mltfr_dist.distributed import checkpoint
from mltfr_dist.distributed.placement import place_tables
from mltfr_dist.distributed.ranks import ALONE, Ranks
from mltfr_dist.errors import CheckpointError, ConfigError, DataError
from mltfr_dist.files import file_sha256, write_atomically
from mltfr_dist.losses import LOSSES
from mltfr_dist.models.backbone import backbone_class
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.models.selectors import selector_class
from mltfr_dist.presets import PREPARATIONS
from mltfr_dist.published.checks import check_group
from mltfr_dist.published.negatives import published_negatives
from mltfr_dist.schema import changed, or_nearest
from mltfr_dist.spec import ModelSpec
from mltfr_dist.tables.content import with_content
from mltfr_dist.tables.seeds import seed_tables
from mltfr_dist.tables.store import TokenTable, load_table
from mltfr_dist.training.items import item_features
from mltfr_dist.training.run_folder import CHECKPOINTS
from mltfr_dist.training.tracking import seed_all

INPUTS = "inputs.json"
INITIALISATION = 1 << 32
"""Key of the random numbers of initialisation, apart from any stage's."""


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
    """With `data.on_bad_shard=quarantine`: the run without every shard that any rank finds bad; all ranks must call.

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


def check_tables(config: RunConfig, tables: Sequence[TokenTable]) -> None:
    """Whether a run can work with these tables, by their names and sizes.

    Raises:
        ConfigError: A table given twice, a filter that does not fit one, or a group that cannot be merged.
    """
    names = [table.name for table in tables]
    for table in tables:
        if names.count(table.name) > 1:
            raise ConfigError(
                f"The token table `{table.name}` is given more than once.",
                rule="Experts are told apart by their table's name.",
                remedy="List each table once in mltfr.tables.",
            )
        check_filter(config.mltfr.filter, table)
    if tables:
        consensus_tables(config, tables)


def check_filter(config: FilterConfig, table: TokenTable) -> None:
    """Whether the filter can work on a table of this size.

    Raises:
        ConfigError: It keeps more than it searches, or attends to more than it may.
    """
    rows = len(table.rows)
    if config.strategy in ("direct", "seed_words") and rows > config.max_direct_rows:
        raise ConfigError(
            f"mltfr.filter.strategy={config.strategy} has every position attend to {rows:,} rows of table `{table.name}`.",
            rule=f"At most mltfr.filter.max_direct_rows ({config.max_direct_rows:,}): cost grows with positions x rows.",
            remedy="Raise it if the machine can bear it, give fewer words, or choose with strategy=user_guided.",
        )
    kept = config.num_kept(rows)
    searched = (
        rows if config.strategy == "random_tokens" else min(rows, config.shortlist_size or rows)
    )
    if config.strategy in ("user_guided", "random_tokens") and kept > searched:
        raise ConfigError(
            f"The filter keeps {kept} tokens of table `{table.name}`, of which {searched} rows are searched.",
            rule="It cannot keep more than it searches.",
            remedy="Lower mltfr.filter.top_k or filter_ratio, or raise mltfr.filter.shortlist_size.",
        )


def consensus_tables(config: RunConfig, tables: Sequence[TokenTable]) -> list[int]:
    """Places of the tables whose experts are merged.

    Raises:
        ConfigError: A name that is no table's, or experts of unequal shape.
    """
    names, mltfr = [table.name for table in tables], config.mltfr
    for name in mltfr.consensus.group:
        if name not in names:
            raise ConfigError(
                f"mltfr.consensus.group names `{name}`, which is no table of the run{or_nearest(name, names)}.",
                remedy=f"Tables: {', '.join(names)}.",
            )
    places = [names.index(name) for name in mltfr.consensus.group or names]
    selector = selector_class(mltfr.filter.strategy)
    shapes = {
        names[m]: (tables[m].rows.shape[1], selector.rows_kept(mltfr.filter, len(tables[m].rows)))
        for m in places
    }
    if mltfr.consensus.enabled:
        check_group(config.published, shapes)
    return places


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


def build_model(
    config: RunConfig, inputs: Inputs, ranks: Ranks = ALONE, *, with_consensus: bool
) -> Recommender:
    """A freshly initialised model, the same on every rank; its tables are where the configuration places them."""
    seed_all(config.training.seed, INITIALISATION)
    spec = model_spec(config, inputs, with_consensus=with_consensus)
    placed = place_tables(config, inputs.tables, ranks)
    return spec.build(dict(zip(inputs.table_names, placed, strict=True)), inputs.item_features)


def model_spec(config: RunConfig, inputs: Inputs, *, with_consensus: bool) -> ModelSpec:
    """What a run trains."""
    return ModelSpec(
        backbone=config.backbone,
        mltfr=config.mltfr,
        loss=config.loss,
        published=config.published,
        num_items=inputs.manifest.num_items,
        max_len=config.data.max_len,
        tables=inputs.table_names,
        has_consensus=with_consensus,
        sparse_items=config.optimizer.item_gradients == "sparse",
    )


def load_model(
    config: RunConfig,
    inputs: Inputs,
    folder: Path,
    ranks: Ranks,
    *,
    with_consensus: bool,
) -> Recommender:
    """The model of a checkpoint, in fp32, ready to be evaluated; rank 0 reads it, all must call.

    Args:
        config: The run.
        inputs: Its data and tables.
        folder: The checkpoint.
        ranks: All processes.
        with_consensus: Whether it is one of stage 2.

    Raises:
        CheckpointError: The checkpoint is damaged or does not fit the configuration.
    """
    model = build_model(config, inputs, ranks, with_consensus=with_consensus)
    state = checkpoint.read_for_all(folder, ranks)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"The checkpoint {folder} does not fit its run's configuration: {error}.",
            remedy="Restore config.yaml and the data it names as they were.",
        ) from None
    return model.to(ranks.device).eval()


def ranking_stream(config: RunConfig, split: str, ranks: Ranks) -> RankingStream:
    """This rank's users of a split."""
    return RankingStream(
        config.data.path,
        split,
        max_len=config.data.max_len,
        batch_size=config.evaluation.batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        left_out=config.data.left_out,
    )


def train_stream(config: RunConfig, layout: BatchLayout) -> TrainStream:
    """This rank's share of the training sequences."""
    return TrainStream(
        config.data.path,
        config.data,
        layout,
        seed=config.training.seed,
        objective=objective(config),
        split="valid" if config.published.train_on_validation else "train",
    )


def objective(config: RunConfig) -> Objective:
    """What batches must hold for the backbone and the loss."""
    backbone, loss, kind = config.backbone, config.loss, backbone_class(config.backbone.name)
    views = backbone.cl4srec
    negatives = LOSSES[loss.name].negatives
    return Objective(
        num_negatives=loss.num_negatives if negatives == "per_position" else 0,
        negative_rule=published_negatives(config.published),
        num_shared_negatives=loss.num_negatives if negatives == "shared" else 0,
        proposal=loss.proposal,
        cloze_ratio=backbone.bert4rec.mask_ratio if kind.objective == "cloze" else None,
        views=ViewRatios(views.crop_ratio, views.mask_ratio, views.reorder_ratio)
        if kind.contrasts_views
        else None,
        group_size=views.contrast_group if kind.contrasts_views else 1,
    )
