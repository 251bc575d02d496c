"""Where targets stand among items: by counting better scores, tile by tile, exactly.

Over items that are divided, each part counts in its own rows, against the same targets' scores, and
counts are added. Shapes: as in ``tiles.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mltfr_dist.models.kernels import LeftOut, count_between, counts_in_registers
from mltfr_dist.models.tiles import PART_ELEMENTS, UNIT, Pairs, Tile, Tiles

OPEN_PAIRS = 1 << 16
"""Near-ties that are gathered before they are settled together."""
RUN = 64
"""Neighbouring numbers that are looked at together."""


class RankCounts(NamedTuple):
    """What stands before and beside each target; over parts of the items, to be added."""

    better: Tensor
    """[B] int64, items of a higher score."""
    equal: Tensor
    """[B] int64, other items of the same score."""


class LogNormaliser:
    """log sum exp of all scores of each user, tile by tile (as computed: no more exact than a loss
    is).
    """

    def __init__(self, hidden: Tensor) -> None:
        """Args: hidden: [B, D]."""
        self.powers = torch.zeros(2, len(hidden), dtype=torch.float64, device=hidden.device)
        """[2, B] what scores are shifted by, and the sums of exponentials of shifted scores."""
        self.powers[0] = -torch.inf

    def add(self, tile: Tile) -> None:
        """Take in a tile's scores."""
        shift, total = self.powers[:, tile.users]
        new = torch.maximum(shift, tile.scores.amax(1).double())
        terms = (tile.scores - new[:, None].to(tile.scores.dtype)).exp_()
        total.mul_((shift - new).exp_()).add_(terms.sum(1))
        shift.copy_(new)

    @property
    def value(self) -> Tensor:
        """[B] float64."""
        return self.powers[0] + self.powers[1].log()


def count_better(
    hidden: Tensor,
    item_vectors: Tensor,
    target_scores: Tensor,
    *,
    exclude: Pairs | None = None,
    first_id: int = 1,
    normaliser: LogNormaliser | None = None,
    tile: tuple[int, int] | None = None,
) -> RankCounts:
    """How many items score higher than each user's target, and how many the same.

    A target's rank is 1 + the better ones (and, by the tie rule, the equal ones); for that the
    target itself must be among ``exclude``. The counts are exact: the same for any ``tile``, any
    division of users and items, on any device. Memory: two tiles.

    Args:
        hidden: [B, D] states that rank the next item.
        item_vectors: [R, D] of the items ``first_id``, ``first_id`` + 1, ...: all of them without
            padding, or the rows that are here.
        target_scores: [B] from :func:`~mltfr_dist.models.tiles.exact_scores`.
        exclude: Pairs that do not count (seen items, the targets themselves), in any order.
        first_id: Id of the first of ``item_vectors``.
        normaliser: Takes in every score, of excluded pairs too.
        tile: Users and items at a time; None: what suits the device.

    Raises:
        ValueError: A score is NaN or not finite: the model has diverged.
    """
    if not target_scores.isfinite().all():
        raise ValueError("a target has no finite score: the model has diverged")
    tiles = Tiles(hidden, item_vectors, first_id, exclude, tile)
    if counts_in_registers(tiles.hidden, target_scores):
        items = max(1, PART_ELEMENTS // hidden.shape[1]) if tile is None else tiles.shape[1]
        return _counted_in_registers(tiles, target_scores, items, normaliser)
    counts = _Counts(tiles, target_scores)
    for scored in tiles:
        if normaliser is not None:
            normaliser.add(scored)
        tiles.leave_out(scored)
        counts.add(scored)
    counts.settle()
    return RankCounts(counts.better.long(), counts.equal.long())


def _counted_in_registers(
    tiles: Tiles, target_scores: Tensor, items: int, normaliser: LogNormaliser | None
) -> RankCounts:
    """The same by a kernel that writes no scores, some ``items`` at a time."""
    powers = None if normaliser is None else normaliser.powers
    counts = torch.zeros(2, len(target_scores), dtype=torch.int64)
    left_out = LeftOut(*tiles.excluded_by_user())
    for start, vectors, error in tiles.item_blocks(items):
        low, high = _limits(target_scores, error)
        count_between(
            tiles.hidden, vectors, low, high, target_scores, left_out, start, counts, powers
        )
    return RankCounts(*counts)


def _limits(target_scores: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """What a computed score [B] in fp32 is above if it may be as high as the target's, and what if
    it certainly is higher, where ``error`` [B] bounds that of any score.
    """
    target = target_scores.double()
    error = error + 8 * UNIT[target_scores.dtype] * target.abs()  # the limits are rounded, too
    return (target - error).to(target_scores.dtype), (target + error).to(target_scores.dtype)


class _Counts:
    """Counts of all tiles so far, but for near-ties that are still open."""

    def __init__(self, tiles: Tiles, target_scores: Tensor) -> None:
        """Args: tiles: what is counted in; target_scores: [B]."""
        self._tiles, self._targets = tiles, target_scores
        self._above = tiles.hidden.new_empty(tiles.shape[0] * tiles.shape[1])
        self._open: list[tuple[Tensor, Tensor]] = []
        self._num_open = 0
        # As floats, which hold them up to 2^53.
        self.better = torch.zeros_like(target_scores, dtype=torch.float64)
        self.equal = torch.zeros_like(self.better)

    def add(self, tile: Tile) -> None:
        """Take in a tile, whose scores are overwritten."""
        scores, users = tile.scores, tile.users
        low, high = _limits(self._targets[users], tile.error)
        above = torch.gt(scores, high[:, None], out=self._above[: scores.numel()].view_as(scores))
        # 1.0 or 0.0, as `above`: another format would take longer.
        may_be = scores.gt_(low[:, None])
        num_above = above.sum(1)
        self.better[users] += num_above
        near = (may_be.sum(1) != num_above).nonzero()[:, 0]
        if len(near):
            rows, columns = _nonzero(may_be[near].sub_(above[near]))
            self._open.append((near[rows] + users.start, columns + tile.start))
            self._num_open += len(rows)
        if self._num_open > OPEN_PAIRS:
            self.settle()

    def settle(self) -> None:
        """Count the near-ties by their true scores."""
        if not self._open:
            return
        rows, indices = (torch.cat(column) for column in zip(*self._open, strict=True))
        self._open, self._num_open = [], 0
        scores, targets = self._tiles.exact(rows, indices), self._targets[rows]
        self.better.index_add_(0, rows, (scores > targets).double())
        self.equal.index_add_(0, rows, (scores == targets).double())


def _nonzero(sparse: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of what is not 0 in [n, T] numbers >= 0: by sums of runs, for few are."""
    runs = F.pad(sparse.flatten(), (0, -sparse.numel() % RUN)).view(-1, RUN)
    filled = runs.sum(1).nonzero()[:, 0]
    within = runs[filled].nonzero()
    indices = filled[within[:, 0]] * RUN + within[:, 1]
    return indices // sparse.shape[1], indices % sparse.shape[1]
