"""What all ranks of a run must have alike."""

from __future__ import annotations

import os

from mltfr_dist.config import RunConfig
from mltfr_dist.distributed.engine import versions
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.models.replay import SWITCH
from mltfr_dist.training.run_folder import leaf_values


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
    # Recorded passes give gradients in another order, by which ranks add them up.
    leaves[f"the environment's {SWITCH}"] = os.environ.get(SWITCH, "")
    ranks.agree(
        leaves,
        rule=rule,
        remedy="Start every rank with the same preset, file, overrides and environment.",
    )
