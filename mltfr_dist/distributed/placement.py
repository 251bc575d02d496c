"""Where token tables are held: the placements that a configuration can ask for, and which one it
gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from mltfr_dist.config import RunConfig
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.distributed.table_shards import Exchange, RowSharded, ZeroTable, row_bounds
from mltfr_dist.errors import ConfigError
from mltfr_dist.models.placed_table import MappedTable, PlacedTable
from mltfr_dist.published.components import published_table
from mltfr_dist.tables.store import TokenTable, read_rows

Placement = Literal["rows", "mmap", "replicated", "zero3"]


def resolve_placement(config: RunConfig, ranks: Ranks) -> Placement:
    """The placement that a run gets: `auto` is `rows` above one rank, wherever no rank needs a
    whole table.
    """
    if config.mltfr.placement != "auto":
        return config.mltfr.placement
    return "replicated" if ranks.world_size == 1 or config.needs_whole_tables else "rows"


def check_placement(
    config: RunConfig, tables: Sequence[TokenTable], ranks: Ranks, zero_stage: int
) -> None:
    """Whether the placement goes together with the run.

    Raises:
        ConfigError: ZeRO-3 tables at another stage, or fewer rows than ranks.
    """
    placement = resolve_placement(config, ranks)
    if not config.mltfr.enabled:
        return
    if placement == "zero3" and zero_stage != 3:
        raise ConfigError(
            f"mltfr.placement=zero3 at ZeRO stage {zero_stage}.",
            rule="Only stage 3 divides parameters.",
            remedy="Use deepspeed=ds_configs/zero3.json, or mltfr.placement=rows, which needs no "
            "stage.",
        )
    for table in tables:
        if placement == "rows" and len(table.rows) < ranks.world_size:
            raise ConfigError(
                f"Table `{table.name}` has {len(table.rows)} rows, and mltfr.placement=rows "
                f"divides them over {ranks.world_size} "
                "ranks.",
                rule="Every rank holds at least one.",
                remedy="Use mltfr.placement=mmap or replicated.",
            )


def place_tables(
    config: RunConfig, tables: Sequence[TokenTable], ranks: Ranks
) -> list[PlacedTable]:
    """The tables as the model uses them, still on the host; of divided ones only this rank's rows
    are read.
    """
    placement = resolve_placement(config, ranks)
    if placement == "rows" and ranks.world_size > 1:
        exchange = Exchange(ranks)
        shares = [
            row_bounds(len(table.rows), ranks.world_size)[ranks.rank :][:2] for table in tables
        ]
        return [
            RowSharded(read_rows(t, *share), len(t.rows), exchange)
            for t, share in zip(tables, shares, strict=True)
        ]
    if placement == "mmap":
        return [MappedTable(table.rows) for table in tables]
    if placement == "zero3":
        return [ZeroTable(_own_rows(table)) for table in tables]
    hold = published_table(config.published)
    return [hold(_own_rows(table)) for table in tables]


def _own_rows(table: TokenTable) -> torch.Tensor:
    """[V, D_m] rows in memory of this process, without the pages of a stored table's mapping."""
    is_stored = table.content == "real" and table.row_ids is None
    return read_rows(table, 0, len(table.rows)) if is_stored else table.rows


def placement_text(config: RunConfig, ranks: Ranks) -> str:
    """What the opening lines say."""
    placement = resolve_placement(config, ranks)
    texts = {
        "rows": f"each rank holds 1/{ranks.world_size} of the rows",
        "mmap": "read from the file, one copy a node",
        "replicated": "each rank holds every row",
        "zero3": "divided by ZeRO-3, gathered at each use",
    }
    chosen = config.mltfr.placement == "auto" and ranks.world_size > 1
    because = config.needs_whole_tables if chosen else None
    return f"{placement}: {texts[placement]}" + (f", because {because}" if because else "")
