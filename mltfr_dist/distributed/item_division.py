"""An item table divided by rows over the ranks: lookups, the full softmax, and ranks of targets.

A step of a rank that reads U distinct rows asks their owners for them (8 bytes a row) and gets them
(D numbers a row); their gradients go home the same way after the backward pass. The full softmax
moves hidden states to the rows in place of rows to the hidden states: every rank forms the logits
of its own items for all ranks' positions.

Shapes: R rows of the table, O of them this rank's, N positions of this rank, M of all ranks, D
hidden size, B users.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.distributed.row_layout import RowLayout
from mltfr_dist.distributed.table_shards import Exchange
from mltfr_dist.models.divided_rows import Division
from mltfr_dist.models.rank_counts import LogNormaliser, RankCounts, count_better
from mltfr_dist.models.search import best
from mltfr_dist.models.tiles import Pairs
from mltfr_dist.models.top_items import top_of_some
from mltfr_dist.numerics import at_least_fp32

CPU_LOGITS, GPU_LOGITS = 1 << 21, 1 << 26
"""Logits held at a time."""
MIN_CHUNK_ROWS = 64
"""Positions of a chunk at least: each passes over all rows and their gradient."""
SUMMED = 2048
"""Items over which a product sums in fp32 at most: over ten thousand, sums lose a digit."""


class RankDivision(Division):
    """R rows over all ranks. All ranks must call a method at the same point."""

    def __init__(self, num_rows: int, ranks: Ranks) -> None:
        """Args: num_rows: R; ranks: all processes, two at least."""
        self.layout, self.ranks, self.exchange = (
            RowLayout(num_rows, ranks.world_size),
            ranks,
            Exchange(ranks),
        )
        self.first, self.end = self.layout.bounds[ranks.rank :][:2]
        self.own_ids = self.layout.ids_between(self.first, self.end).to(ranks.device)

    def positions(self, item_ids: Tensor) -> Tensor:
        """Ids [...] -> positions [...] in the layout's order."""
        return self.layout.positions(item_ids)

    def shares(self, positions: Tensor) -> list[int]:
        """[ranks] how many of ascending ``positions`` [U] are each rank's."""
        ends = torch.searchsorted(positions, positions.new_tensor(self.layout.bounds)).tolist()
        return [end - start for start, end in pairwise(ends)]

    def fetch(self, own: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows at ascending ``positions`` [U] -> [U, D] in ``dtype``, in which they are sent."""
        wanted = self.shares(positions)
        asked = self.exchange_counts(wanted)
        rows = self.exchange.deal(positions, wanted, asked) - self.first
        return self.exchange.deal(own.index_select(0, rows).to(dtype), asked, wanted)

    def exchange_counts(self, sent: list[int]) -> list[int]:
        """How many rows each rank sends here, where this one sends ``sent`` to each."""
        ones = [1] * len(sent)
        given = torch.tensor(sent, device=self.ranks.device)
        return [int(n) for n in self.exchange.deal(given, ones, ones).tolist()]

    def cross_entropy(
        self, hidden: Tensor, own: Tensor, targets: Tensor, weights: Tensor, num_items: int
    ) -> Tensor:
        """Softmax cross-entropy over items 1..num_items, summed over this rank's positions."""
        result: Tensor = _DividedCrossEntropy.apply(hidden, own, targets, weights, num_items, self)  # type: ignore[no-untyped-call]
        return result

    def count_better(
        self,
        hidden: Tensor,
        own: Tensor,
        target_scores: Tensor,
        exclude: Pairs,
        num_items: int,
        *,
        normalise: bool,
    ) -> tuple[RankCounts, Tensor | None]:
        """Counts of this rank's users: every rank counts in its own rows for all users, and counts
        are added.
        """
        counts, pairs = (self.exchange.counts(len(given)) for given in (hidden, exclude.rows))
        start = list(accumulate(counts, initial=0))[self.ranks.rank]
        every, targets = (self.exchange.gather(given, counts) for given in (hidden, target_scores))
        rows = self.exchange.gather(exclude.rows + start, pairs)
        left_out = Pairs(rows, self.exchange.gather(self.positions(exclude.item_ids), pairs))
        normaliser = LogNormaliser(every) if normalise else None
        totals = torch.zeros(2, len(every), dtype=torch.int64, device=every.device)
        edges = [-1, *_no_items(self, num_items).tolist(), len(own)]
        for before, end in pairwise(edges):  # of rows that are items
            own_rows, first = own[before + 1 : end], self.first + before + 1
            better = count_better(
                every, own_rows, targets, exclude=left_out, first_id=first, normaliser=normaliser
            )
            totals += torch.stack(better)
        mine = slice(start, start + len(hidden))
        positions = RankCounts(*self.reduce(totals, dist.ReduceOp.SUM)[:, mine])
        if normaliser is None:
            return positions, None
        largest = self.reduce(normaliser.value.clone(), dist.ReduceOp.MAX)
        total = self.reduce((normaliser.value - largest).exp(), dist.ReduceOp.SUM)
        return positions, (largest + total.log())[mine]

    def top_items(
        self, hidden: Tensor, own: Tensor, k: int, exclude: Pairs, num_items: int
    ) -> tuple[Tensor, Tensor]:
        """The best of this rank's users: every rank finds the best in its own rows for all users,
        and each user's rank keeps the best of those.
        """
        counts, pairs = (self.exchange.counts(len(given)) for given in (hidden, exclude.rows))
        start = list(accumulate(counts, initial=0))[self.ranks.rank]
        every = self.exchange.gather(hidden, counts)
        rows = self.exchange.gather(exclude.rows + start, pairs)
        left_out = Pairs(rows, self.exchange.gather(exclude.item_ids, pairs))
        ids, order = self.own_ids.sort()
        items = (ids >= 1) & (ids <= num_items)
        top = top_of_some(every, own[order[items]], ids[items], k, left_out)
        homes = [len(hidden)] * len(counts)
        values, ids = (self.exchange.deal(column, counts, homes) for column in top)  # [N B, k]
        values, ids = (
            column.view(len(counts), -1, k).transpose(0, 1).flatten(1) for column in (values, ids)
        )
        return best(values, ids, k)

    def reduce(self, values: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
        """``values`` of all ranks as one, in place."""
        self.ranks.reduce(values, operation)
        others = self.ranks.world_size - 1
        size = values.numel() * values.element_size()
        self.exchange.received["all_reduce"] += 2 * size * others // self.ranks.world_size
        return values


class _DividedCrossEntropy(torch.autograd.Function):
    """As :func:`mltfr_dist.models.losses.full_cross_entropy`, in which each rank forms the logits
    of its own items.

    Two passes over chunks of logits, and between them one exchange of each position's maximum, sum
    of exponentials and target's logit. All that is exchanged is exchanged here, gradients of hidden
    states too: the backward pass only scales them, for every rank's loss has the same factor.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        own: Tensor,
        targets: Tensor,
        weights: Tensor,
        num_items: int,
        division: RankDivision,
    ) -> Tensor:
        exchange = division.exchange
        counts = exchange.counts(len(hidden))
        every = exchange.gather(hidden, counts)  # [M, D]
        columns = exchange.gather(division.positions(targets), counts) - division.first  # [M]
        every_weight = exchange.gather(at_least_fp32(weights), counts)
        logits = _Logits(every, own.detach(), columns, _no_items(division, num_items))
        largest, total, target = logits.statistics()
        common = division.reduce(largest.clone(), dist.ReduceOp.MAX)
        total *= (largest - common).exp()
        total, target = division.reduce(torch.stack([total, target]), dist.ReduceOp.SUM)
        start = list(accumulate(counts, initial=0))[division.ranks.rank]
        mine = slice(start, start + len(hidden))
        losses = total[mine].log() + common[mine] - target[mine]
        if hidden.requires_grad or own.requires_grad:
            to_every, to_own = logits.gradients(common, every_weight / total, every_weight)
            home = exchange.deal(to_every, counts, [len(hidden)] * len(counts))
            grad_hidden = at_least_fp32(home.view(len(counts), *hidden.shape)).sum(0)
            ctx.save_for_backward(grad_hidden.to(hidden.dtype), to_own.to(own.dtype))
        summed: Tensor = (every_weight[mine] * losses).sum()
        return summed

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (grad_total,) = grad_outputs
        grad_hidden, grad_own = ctx.saved_tensors
        return (
            grad_hidden * grad_total.to(grad_hidden.dtype),
            grad_own * grad_total.to(grad_own.dtype) if ctx.needs_input_grad[1] else None,
            *[None] * 4,
        )


def _no_items(division: RankDivision, num_items: int) -> Tensor:
    """[0..] columns of this rank's rows that are no items."""
    ids = division.own_ids
    return ((ids < 1) | (ids > num_items)).nonzero()[:, 0]


class _Logits:
    """This rank's columns of the logits, of which a chunk is held at a time."""

    def __init__(self, hidden: Tensor, own: Tensor, columns: Tensor, left_out: Tensor) -> None:
        """Args: hidden: [M, D]; own: [O, D]; columns: [M] the targets', outside 0..O-1 where
        another rank holds it.
        """
        self.hidden, self.own, self.left_out = hidden, own.to(hidden.dtype), left_out
        self.is_here = (columns >= 0) & (columns < len(own))
        self.columns = torch.where(self.is_here, columns, 0)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Slices of the M positions, and their logits [n, O]."""
        held = CPU_LOGITS if self.hidden.device.type == "cpu" else GPU_LOGITS
        rows = max(MIN_CHUNK_ROWS, held // len(self.own))
        for start in range(0, len(self.hidden), rows):
            chunk = slice(start, start + rows)
            logits = at_least_fp32(self.hidden[chunk] @ self.own.T)
            logits[:, self.left_out] = -torch.inf
            yield chunk, logits

    def statistics(self) -> tuple[Tensor, Tensor, Tensor]:
        """[M] each: the largest logit, the sum of exponentials below it, and the target's logit, 0
        where it is not here.
        """
        largest, total, target = at_least_fp32(self.hidden.new_zeros(3, len(self.hidden)))
        for chunk, logits in self.chunks():
            lowest = torch.finfo(logits.dtype).min  # of a rank without items
            largest[chunk] = logits.amax(1).clamp(min=lowest)
            of_targets = logits.gather(1, self.columns[chunk, None])[:, 0]
            target[chunk] = torch.where(self.is_here[chunk], of_targets, 0)
            total[chunk] = logits.sub_(largest[chunk, None]).exp_().sum(1)
        return largest, total, target

    def gradients(self, common: Tensor, factors: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Of the weighted sum of all M losses: to the hidden states by these columns [M, D], and to
        the rows [O, D].
        """
        to_hidden = torch.empty_like(self.hidden)
        to_own = at_least_fp32(torch.zeros_like(self.own))
        for chunk, logits in self.chunks():
            slope = logits.sub_(common[chunk, None]).exp_().mul_(factors[chunk, None])
            given = torch.where(self.is_here[chunk], -weights[chunk], 0)
            slope.scatter_add_(1, self.columns[chunk, None], given[:, None])
            slope = slope.to(self.hidden.dtype)
            to_hidden[chunk] = _product_in_chunks(slope, self.own)
            to_own += slope.T @ self.hidden[chunk]
        return to_hidden, to_own


def _product_in_chunks(left: Tensor, right: Tensor) -> Tensor:
    """Product of [n, O] and [O, D], whose sums in fp32 are formed in chunks."""
    if left.dtype != torch.float32:
        return left @ right
    product = left.new_zeros(len(left), right.shape[1])
    chunks = torch.split(left, SUMMED, dim=1), torch.split(right, SUMMED)
    for columns, rows in zip(*chunks, strict=True):
        product += columns @ rows
    return product
