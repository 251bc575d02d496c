"""The models of a run, from its configuration and inputs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mltfr_dist.config import RunConfig
from mltfr_dist.distributed.item_placement import division_of_items
from mltfr_dist.distributed.placement import place_tables
from mltfr_dist.distributed.ranks import ALONE, Ranks
from mltfr_dist.distributed.saving import read_weights
from mltfr_dist.distributed.stored_rows import items_of_checkpoint
from mltfr_dist.errors import CheckpointError
from mltfr_dist.models.divided_rows import Division
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.spec import ModelSpec
from mltfr_dist.training.inputs import Inputs
from mltfr_dist.training.seeds import seed_all

Divide = Callable[[int], Division]
INITIALISATION = 1 << 32
"""Key of the random numbers of initialisation, apart from any stage's."""


def build_model(
    config: RunConfig,
    inputs: Inputs,
    ranks: Ranks = ALONE,
    *,
    with_consensus: bool,
    divide: Divide | None = None,
) -> Recommender:
    """A freshly initialised model, the same on every rank; its tables are where the configuration
    places them, and the item table is divided otherwise where ``divide`` is given.
    """
    seed_all(config.training.seed, INITIALISATION)
    spec = model_spec(config, inputs, with_consensus=with_consensus)
    placed = place_tables(config, inputs.tables, ranks)
    tables = dict(zip(inputs.table_names, placed, strict=True))
    return spec.build(tables, inputs.item_features, divide or division_of_items(config, ranks))


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
    items_stay: bool = False,
) -> Recommender:
    """The model of a checkpoint, in fp32, ready to be evaluated; rank 0 reads it, all must call.

    Args:
        config: The run.
        inputs: Its data and tables.
        folder: The checkpoint.
        ranks: All processes.
        with_consensus: Whether it is one of stage 2.
        items_stay: Whether an item table that was written divided stays in its files; in one
            process.

    Raises:
        CheckpointError: The checkpoint is damaged or does not fit the configuration.
    """
    divide = items_of_checkpoint(folder) if items_stay else None
    model = build_model(config, inputs, ranks, with_consensus=with_consensus, divide=divide)
    state = read_weights(model, folder, ranks)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"The checkpoint {folder} does not fit its run's configuration: {error}.",
            remedy="Restore config.yaml and the data it names as they were.",
        ) from None
    return model.to(ranks.device).eval()
