"""Random state as a function of integers."""

from __future__ import annotations

import torch

from mltfr_dist.data.stream.negatives import hash_u64


def seed_all(*keys: int) -> None:
    """Seed torch from integer keys (seed, stage, step, rank): random state is a function, never
    saved.
    """
    torch.manual_seed(int(hash_u64(*keys) >> 1))
