"""Metrics of single users. Shapes: S seeds, U users, T targets."""

from __future__ import annotations

import numpy as np
import torch

from mltfr_dist.data.shards.packed import IntArray
from mltfr_dist.metrics import METRICS, Targets
from mltfr_dist.statistics.resampling import Floats


def user_values(ranks: Floats, metric: str, users: IntArray) -> Floats:
    """The metric [S, U] of each user by the targets' ranks [S, T].

    Args:
        ranks: Of ``S`` runs.
        metric: Its full name.
        users: [T] number of each target's user, 0..U - 1, each with a target.
    """
    name, _, k = metric.partition("@")
    owners = torch.from_numpy(users)
    targets = [Targets.among(torch.from_numpy(of_run), owners) for of_run in ranks]
    gains = [METRICS[name].value(of_run, int(k or 0)).numpy() for of_run in targets]
    return np.stack([np.bincount(users, of_run) for of_run in gains])
