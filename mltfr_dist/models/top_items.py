"""The items of highest score, exactly, without holding all scores. Shapes: as in ``tiles.py``; k
items of a user.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mltfr_dist.models.kernels import LeftOut, leaders, leads_in_registers
from mltfr_dist.models.search import best
from mltfr_dist.models.tiles import CPU_ELEMENTS, PART_ELEMENTS, UNIT, USERS, Pairs, Tiles

MARGIN = 16
"""Items looked at beyond the k best, at least, whose order a product of matrices may have wrong."""
CPU_USERS = 64
"""Users of a tile at most, so that tiles are wide: what sorts is the same for any width."""
RUN = 64
"""Neighbouring scores of which the largest is looked at first."""


def top_items(
    hidden: Tensor,
    item_vectors: Tensor,
    k: int,
    *,
    exclude: Pairs | None = None,
    first_id: int = 1,
    tile: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``k`` items of highest score for each user, best first; of equal scores the lower ids.

    Scores and order are exact: the same for any ``tile`` and any users beside a user. Over items
    that are divided, the best of each part, put together and sorted (score, then lower id), are the
    best of all. Memory: two tiles and B k.

    Args:
        hidden: [B, D] states that rank the next item.
        item_vectors: [R, D] of the items ``first_id``, ``first_id`` + 1, ...: all of them without
            padding, or the rows that are here.
        k: Items of each user, at least 1.
        exclude: Pairs that must not be found (seen items), in any order.
        first_id: Id of the first of ``item_vectors``.
        tile: Users and items at a time; None: what suits the device.

    Returns:
        Scores and item ids [B, k]; -inf and 0 where fewer than k items are left.

    Raises:
        ValueError: A score is NaN or not finite: the model has diverged.
    """
    on_cpu = tile is None and hidden.device.type == "cpu"
    if on_cpu:
        users = max(1, min(len(hidden), CPU_USERS))
        tile = users, max(1, min(CPU_ELEMENTS // users, len(item_vectors)))
    tiles = Tiles(hidden, item_vectors, first_id, exclude, tile)
    if tiles.format == torch.float32 and leads_in_registers(tiles.hidden, item_vectors):
        items = max(1, PART_ELEMENTS // hidden.shape[1]) if on_cpu else tiles.shape[1]
        values, indices = _in_registers(tiles, min(k, len(item_vectors)), items)
    else:
        values, indices = _in_tiles(tiles, exclude, k)
    missing = k - values.shape[1]
    values = F.pad(values, (0, missing), value=-torch.inf)
    ids = F.pad(indices, (0, missing)) + first_id
    return values, ids.where(values > -torch.inf, 0)


def _in_registers(tiles: Tiles, k: int, items: int) -> tuple[Tensor, Tensor]:
    """Scores and indices [B, k] by a kernel that writes no scores, some ``items`` at a time."""
    error = torch.zeros(len(tiles.hidden), dtype=torch.float64)
    for _, _, of_block in tiles.item_blocks(items):
        error = torch.maximum(error, of_block)
    bounds, excluded = tiles.excluded_by_user()
    tops = [
        leaders(
            tiles.hidden[first : first + USERS],
            tiles.vectors,
            error[first : first + USERS],
            LeftOut(bounds[first : first + USERS + 1], excluded),
            k,
            items,
        )
        for first in range(0, len(tiles.hidden), USERS)
    ]
    return torch.cat([values for values, _ in tops]), torch.cat([indices for _, indices in tops])


def _in_tiles(tiles: Tiles, exclude: Pairs | None, k: int) -> tuple[Tensor, Tensor]:
    """The same from tiles of scores; fewer than k where fewer are looked at."""
    count = min(k + max(MARGIN, k // 4), len(tiles.vectors))
    computed, indices, error = _candidates(tiles, count)
    there = computed > -torch.inf
    rows = torch.arange(len(indices), device=indices.device)[:, None].expand_as(indices)
    scores = torch.full_like(computed, -torch.inf)
    scores[there] = tiles.exact(rows[there], indices[there])
    values, indices = best(scores, indices, k)
    if values.shape[1] == k:
        # What was not looked at scores at most `beyond`; where that may reach the k-th, look again.
        beyond = computed.amin(1).double() + error
        close = ((beyond >= values[:, -1].double()) & there.all(1)).nonzero()[:, 0]
        if len(close):
            again = _of_rows(tiles, close, exclude)
            values[close], indices[close] = _best_above(again, values[close, -1], k)
    return values, indices


def top_of_some(
    hidden: Tensor, vectors: Tensor, item_ids: Tensor, k: int, exclude: Pairs
) -> tuple[Tensor, Tensor]:
    """:func:`top_items` of the items ``item_ids`` [R], ascending, whose vectors are [R, D]."""
    indices = torch.searchsorted(item_ids, exclude.item_ids)
    padded = F.pad(item_ids, (0, 1), value=-1)  # of ids beyond the last
    here = padded[indices] == exclude.item_ids
    left_out = Pairs(exclude.rows[here], indices[here])
    values, indices = top_items(hidden, vectors, k, exclude=left_out, first_id=0)
    there = values > -torch.inf
    return values, torch.zeros_like(indices).masked_scatter(there, item_ids[indices[there]])


def _candidates(tiles: Tiles, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each user the ``count`` largest scores as computed, their indices [B, count], and their
    error [B].
    """
    computed = tiles.hidden.new_full((len(tiles.hidden), count), -torch.inf)
    indices = torch.zeros(computed.shape, dtype=torch.int64, device=computed.device)
    error = torch.zeros(len(computed), dtype=torch.float64, device=computed.device)
    for tile in tiles:
        tiles.leave_out(tile)
        error[tile.users] = torch.maximum(error[tile.users], tile.error)
        largest, where = _largest(tile.scores, count)
        kept = torch.cat([computed[tile.users], largest], dim=1).topk(count, dim=1)
        both = torch.cat([indices[tile.users], where + tile.start], dim=1)
        computed[tile.users], indices[tile.users] = kept.values, both.gather(1, kept.indices)
    return computed, indices, error


def _largest(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest of each row [b, T] and their columns, fewer where T is smaller.

    They lie in the ``count`` runs of largest maxima, so only those are sorted.
    """
    num_runs = scores.shape[1] // RUN
    if num_runs <= 2 * count:
        largest = scores.topk(min(count, scores.shape[1]), dim=1)
        return largest.values, largest.indices
    whole = scores[:, : num_runs * RUN].reshape(len(scores), num_runs, RUN)
    runs = whole.amax(2).topk(count, dim=1).indices[..., None]  # [b, count, 1]
    rest = torch.arange(num_runs * RUN, scores.shape[1], device=scores.device)
    within = torch.arange(RUN, device=scores.device)
    columns = torch.cat(
        [(runs * RUN + within).flatten(1), rest.expand(len(scores), -1)], dim=1
    )  # [b, count * RUN + rest]
    largest = scores.gather(1, columns).topk(count, dim=1)
    return largest.values, columns.gather(1, largest.indices)


def _of_rows(tiles: Tiles, rows: Tensor, exclude: Pairs | None) -> Tiles:
    """Some users of ``tiles``."""
    if exclude is not None:
        new_rows = torch.full((len(tiles.hidden),), -1, device=rows.device)
        new_rows[rows] = torch.arange(len(rows), device=rows.device)
        moved = new_rows[exclude.rows]
        exclude = Pairs(moved[moved >= 0], exclude.item_ids[moved >= 0])
    hidden = tiles.hidden[rows].to(tiles.format)
    return Tiles(hidden, tiles.vectors, tiles.first_id, exclude, tiles.shape)


def _best_above(tiles: Tiles, least: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Scores and indices [B, k] of the best, all of which score at least ``least`` [B].

    Whatever may reach ``least`` is scored exactly; a tile may hold nothing else.
    """
    values = tiles.hidden.new_full((len(least), k), -torch.inf)
    indices = torch.zeros(values.shape, dtype=torch.int64, device=values.device)
    slack = 8 * UNIT[tiles.hidden.dtype] * least.double().abs()
    for tile in tiles:
        tiles.leave_out(tile)
        low = (least.double() - slack)[tile.users] - tile.error
        rows, columns = (tile.scores >= low.to(tile.scores.dtype)[:, None]).nonzero().unbind(1)
        scores = tile.scores.fill_(-torch.inf)
        scores[rows, columns] = tiles.exact(rows + tile.users.start, columns + tile.start)
        both = torch.cat([values[tile.users], scores], dim=1)
        items = torch.arange(tile.start, tile.start + scores.shape[1], device=scores.device)
        ids = torch.cat([indices[tile.users], items.expand(len(scores), -1)], dim=1)
        order = both.argsort(dim=1, descending=True, stable=True)[
            :, :k
        ]  # earlier, so lower, ids first
        values[tile.users], indices[tile.users] = both.gather(1, order), ids.gather(1, order)
    return values, indices
