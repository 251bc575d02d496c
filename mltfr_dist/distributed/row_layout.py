"""Which rank holds which row of a divided table, at any number of ranks.

Rows stand in an order that does not depend on the ranks, and each rank holds a run of it. So a
checkpoint that some ranks wrote is read by any other number of them in runs, each reading its own
rows alone. In that order neighbours in popularity are far apart: row i is in bucket i mod 1024,
buckets follow each other, and within one rows ascend. Runs of ids would have rank 0 send and step
most rows, for popular items have low ids.

Shapes: R rows, N ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mltfr_dist.distributed.table_shards import row_bounds

BUCKETS = 1024
"""A part of the checkpoints' format."""


class RowLayout:
    """The order of R rows and its division over N ranks."""

    def __init__(self, num_rows: int, world_size: int) -> None:
        self.num_rows, self.bounds = num_rows, row_bounds(num_rows, world_size)
        self.full, self.longer = divmod(num_rows, BUCKETS)
        """Rows of a bucket, and how many of the first buckets hold one more."""

    def positions(self, row_ids: Tensor) -> Tensor:
        """Row numbers [...] -> positions 0..R-1 in the order."""
        bucket = row_ids % BUCKETS
        return self._start(bucket) + row_ids // BUCKETS

    def row_ids(self, positions: Tensor) -> Tensor:
        """The way back."""
        end = self.longer * (self.full + 1)
        bucket = torch.where(
            positions < end,
            positions // (self.full + 1),
            self.longer + (positions - end) // max(1, self.full),
        )
        return (positions - self._start(bucket)) * BUCKETS + bucket

    def ids_between(self, first: int, end: int) -> Tensor:
        """[end - first] row numbers at these positions."""
        return self.row_ids(torch.arange(first, end))

    def _start(self, bucket: Tensor) -> Tensor:
        return bucket * self.full + bucket.clamp(max=self.longer)
