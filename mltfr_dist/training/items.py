"""The items of prepared data by number, and what the token tables say of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mltfr_dist.config import RunConfig
from mltfr_dist.data.shards.manifest import ITEMS_NAME, open_map, read_manifest
from mltfr_dist.errors import ConfigError
from mltfr_dist.serving.items import ItemMap
from mltfr_dist.tables.store import TokenTable
from mltfr_dist.tables.titles import title_features


def load_items(config: RunConfig) -> ItemMap:
    """The items of a run's prepared data.

    Raises:
        DataError: `items.parquet` is not what the manifest says.
    """
    folder = config.data.path
    file = open_map(folder, read_manifest(folder), ITEMS_NAME)
    return ItemMap.of(file, f"{folder}/{ITEMS_NAME}")


def item_features(config: RunConfig, tables: Sequence[TokenTable]) -> torch.Tensor | None:
    """What ``mltfr.item_tokens`` gives each item of every table, [num_items + 1, sum of D_m]; None
    where it gives nothing.

    Raises:
        ConfigError: Titles are asked for and the data has none.
    """
    if not config.mltfr.enabled or config.mltfr.item_tokens.source == "none":
        return None
    titles = load_items(config).titles
    if not titles.any:
        raise ConfigError(
            f"mltfr.item_tokens.source=titles, but the prepared data {config.data.path} has no "
            f"item titles.",
            rule="This positive control reads each item's title.",
            remedy="Prepare the data with --titles FILE, or set mltfr.item_tokens.source=none.",
        )
    return torch.cat([title_features(titles, table) for table in tables], dim=1) / math.sqrt(
        len(tables)
    )
