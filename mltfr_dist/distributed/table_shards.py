"""Token tables divided over the ranks: by rows with an exchange of our own, or as frozen parameters
of ZeRO-3.

By rows, rank r holds rows r V // N to (r + 1) V // N of a table. Queries are gathered, each rank
searches its rows for all of them and returns each query's best (score, row number) to its rank,
which keeps the best of all and fetches those rows. What carries a gradient then runs where the
query is, on fetched rows, so that no gradient crosses ranks here.

Every method that looks at rows is a collective: all ranks call it at the same point, with any
number of queries or rows, none included.

Shapes: V x D_m the table, N ranks, G queries of this rank, D hidden size, K kept rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.models.draws import GumbelNoise
from mltfr_dist.models.placed_table import PlacedTable, WholeTable
from mltfr_dist.models.relevance import row_relevance
from mltfr_dist.models.search import Project, best, nearest_rows, search_rows


def row_bounds(num_rows: int, world_size: int) -> list[int]:
    """[N + 1] first row of each rank's share, and the number of rows."""
    return [rank * num_rows // world_size for rank in range(world_size + 1)]


class Exchange:
    """The two collectives of row shards, for tensors of any format, and what they have sent."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.received: Counter[str] = Counter()
        """Bytes that came from other ranks so far, by collective."""

    def counts(self, count: int) -> list[int]:
        """``count`` of every rank."""
        received = torch.empty(self.ranks.world_size, dtype=torch.int64, device=self.ranks.device)
        dist.all_gather_into_tensor(received, received.new_tensor([count]))
        self.received["all_gather"] += 8 * (self.ranks.world_size - 1)
        return [int(n) for n in received.tolist()]

    def gather(self, own: Tensor, counts: list[int]) -> Tensor:
        """[n_r, ...] of every rank r -> [sum of n, ...], in the order of the ranks."""
        raw = _bytes(own)
        padded = raw.new_zeros(max(1, *counts), raw.shape[1])
        padded[: len(raw)] = raw
        everyone = padded.new_empty(len(counts), *padded.shape)
        dist.all_gather_into_tensor(everyone.flatten(0, 1), padded)
        self.received["all_gather"] += padded.numel() * (len(counts) - 1)
        whole = torch.cat([rows[:count] for rows, count in zip(everyone, counts, strict=True)])
        return whole.view(own.dtype).view(-1, *own.shape[1:])

    def deal(self, own: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send ``sent[r]`` rows of ``own`` [sum, ...] to each rank r; returns what came, in the
        order of the ranks.
        """
        raw = _bytes(own)
        rows = raw.new_empty(sum(received), raw.shape[1])
        dist.all_to_all_single(rows, raw, received, sent)
        self.received["all_to_all"] += (sum(received) - received[self.ranks.rank]) * raw.shape[1]
        return rows.view(own.dtype).view(-1, *own.shape[1:])


def _bytes(t: Tensor) -> Tensor:
    """[n, ...] -> [n, bytes of a row], so that every backend takes every format."""
    return t.contiguous().view(len(t), math.prod(t.shape[1:])).view(torch.uint8)


class RowSharded(PlacedTable):
    """A table of which this rank holds a share of the rows."""

    rows: Tensor

    def __init__(self, rows: Tensor, num_rows: int, exchange: Exchange) -> None:
        """Args: rows: [V / N, D_m] its share; num_rows: V; exchange: With the other ranks."""
        super().__init__()
        self.num_rows, self.dim = num_rows, rows.shape[1]
        self.register_buffer("rows", rows, persistent=False)
        self.exchange, self.ranks = exchange, exchange.ranks
        self.bounds = row_bounds(num_rows, self.ranks.world_size)
        self.first = self.bounds[self.ranks.rank]

    def take(self, row_ids: Tensor) -> Tensor:
        """Rows of ascending numbers ``row_ids`` [n] -> [n, D_m], from the ranks that hold them."""
        ends = torch.searchsorted(row_ids, row_ids.new_tensor(self.bounds)).tolist()
        wanted = [end - start for start, end in pairwise(ends)]
        asked = self.exchange.deal(
            torch.tensor(wanted, device=row_ids.device), *[[1] * len(wanted)] * 2
        ).tolist()
        ids = self.exchange.deal(row_ids, wanted, asked)
        return self.exchange.deal(self.rows.index_select(0, ids - self.first), asked, wanted)

    def search(
        self, query: Tensor, project: Project, num_kept: int, noise: GumbelNoise | None = None
    ) -> Tensor:
        """[G, K] numbers of the rows of highest score of the whole table for each of this rank's
        queries, best first.
        """
        counts = self.exchange.counts(len(query))
        queries = self.exchange.gather(query, counts)
        if noise is not None:
            own_ids = torch.arange(self.first, self.first + len(self.rows), device=query.device)
            noise = noise._replace(keys=self.exchange.gather(noise.keys, counts), row_ids=own_ids)
        scores, indices = search_rows(
            queries, self.rows, project, num_kept, noise
        )  # [sum of G, K or fewer]
        missing = num_kept - scores.shape[1]
        scores = nn.functional.pad(scores, (0, missing), value=-torch.inf)
        ids = nn.functional.pad(indices + self.first, (0, missing), value=self.num_rows)
        nearest = torch.stack([scores.view(torch.int32), ids.int()], dim=-1)  # [sum of G, K, 2]
        nearest = self.exchange.deal(nearest, counts, [len(query)] * len(counts))
        nearest = (
            nearest.view(len(counts), len(query), num_kept, 2).transpose(0, 1).flatten(1, 2)
        )  # [G, N * K, 2]
        return best(
            nearest[..., 0].contiguous().view(torch.float32), nearest[..., 1].long(), num_kept
        )[1]

    def relevance(self, query: Tensor, project: Project, needed: int | None = None) -> Tensor:
        """[V] largest cosine of each row with any query of any rank."""
        queries = self.exchange.gather(query, self.exchange.counts(len(query)))
        shares = [end - start for start, end in pairwise(self.bounds)]
        own = row_relevance(queries, self.rows, project, needed=needed)
        return self.exchange.gather(own, shares)

    def cast(self, dtype: torch.dtype) -> None:
        """Bring this rank's share to ``dtype``."""
        self.rows = self.rows.to(dtype)


class ZeroTable(WholeTable):
    """A table as a frozen parameter, which ZeRO-3 divides and which is gathered whole at each use.
    For comparison.
    """

    def __init__(self, rows: Tensor) -> None:
        """Args: rows: [V, D_m]."""
        super().__init__()
        self.num_rows, self.dim = rows.shape
        self.rows = nn.Parameter(rows, requires_grad=False)

    def forward(self, use: Callable[[Tensor], Tensor]) -> Tensor:
        """``use`` of the rows [V, D_m]: ZeRO-3 gathers them before a module's forward and divides
        them again after it.
        """
        return use(self.rows)

    def whole(self) -> Tensor:
        """[V, D_m], a copy."""
        return self(lambda rows: rows.detach().clone())  # type: ignore[no-any-return]

    def take(self, row_ids: Tensor) -> Tensor:
        """Rows ``row_ids`` [n] -> [n, D_m]."""
        return self(lambda rows: rows.index_select(0, row_ids))  # type: ignore[no-any-return]

    def search(
        self, query: Tensor, project: Project, num_kept: int, noise: GumbelNoise | None = None
    ) -> Tensor:
        """[G, K] numbers of the rows of highest score for each query, best first."""
        nearest = self(lambda rows: nearest_rows(query, rows, project, num_kept, noise))
        return nearest  # type: ignore[no-any-return]

    def relevance(self, query: Tensor, project: Project, needed: int | None = None) -> Tensor:
        """[V] largest cosine of each row with any of the queries."""
        relevance = self(lambda rows: row_relevance(query, rows, project, needed=needed))
        return relevance  # type: ignore[no-any-return]

    def cast(self, dtype: torch.dtype) -> None:
        """Nothing: DeepSpeed casts parameters."""

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """A table is known by its hash and never saved."""

    def _load_from_state_dict(self, *given: Any) -> None:
        """Nor is it loaded."""
