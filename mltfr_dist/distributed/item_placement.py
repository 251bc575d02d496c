"""Where the item table is held: what a configuration gets at a number of ranks, and what cannot
be.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from mltfr_dist.config import RunConfig
from mltfr_dist.config.item_table import needs_whole_items
from mltfr_dist.distributed.item_division import RankDivision
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.errors import ConfigError
from mltfr_dist.models.divided_rows import Division


def resolve_items(config: RunConfig, ranks: Ranks) -> Literal["replicated", "rows"]:
    """The placement that a run gets; one rank holds every row in any case."""
    placement = config.item_table.placement
    if ranks.world_size == 1 or placement == "replicated":
        return "replicated"
    return "replicated" if placement == "auto" and _reason(config) else "rows"


def _reason(config: RunConfig) -> str | None:
    return needs_whole_items(config.loss.name, config.optimizer.name)


def division_of_items(config: RunConfig, ranks: Ranks) -> Callable[[int], Division] | None:
    """How so many rows of the item table are divided; None where each rank holds all."""
    return partial(RankDivision, ranks=ranks) if resolve_items(config, ranks) == "rows" else None


def check_items_divide(config: RunConfig, num_items: int, ranks: Ranks) -> None:
    """Whether there is an item for each rank.

    Raises:
        ConfigError: There are more ranks.
    """
    if resolve_items(config, ranks) == "rows" and num_items < ranks.world_size:
        raise ConfigError(
            f"The data has {num_items} items, and "
            f"item_table.placement={config.item_table.placement} divides "
            f"them over {ranks.world_size} ranks.",
            rule="Every rank holds at least one.",
            remedy="Use item_table.placement=replicated.",
        )


def items_text(config: RunConfig, ranks: Ranks) -> str:
    """What the opening lines say."""
    if resolve_items(config, ranks) == "rows":
        return f"rows: each rank holds 1/{ranks.world_size} of the rows"
    reason = _reason(config) if config.item_table.placement == "auto" else None
    return "replicated: each rank holds every row" + (f", because {reason}" if reason else "")
