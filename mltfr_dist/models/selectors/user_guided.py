"""User-guided token filtering (docs/method.md): the rows of a table nearest to a user's history,
with soft weights.

Shapes: G queries, S candidate rows of one table, V_m x D_m the table, D hidden size, K kept tokens.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mltfr_dist.config import FilterConfig
from mltfr_dist.models.draws import LARGEST, GumbelNoise, mix
from mltfr_dist.models.kernels import map_rows, unit_backward, weigh_kept
from mltfr_dist.models.placed_table import PlacedTable
from mltfr_dist.models.search import TOLERANCE, Project, row_relevance, search
from mltfr_dist.models.selectors.base import Queries, Reduce, Selection, Selector, those_kept
from mltfr_dist.models.selectors.shortlist import RECALL_QUERIES, Shortlist

PROJECTED_ROWS = 4096
"""Rows projected at a time, so that rows of another device or format are never all copied."""
SHORTEST = 1e-12
"""Vectors are divided by no less, as ``F.normalize`` does."""
WORTH_A_COPY = 0.8
"""Share of a shortlist's rows that queries keep up to which these alone go on: a copy of more costs
more than it saves.
"""


class Unit(NamedTuple):
    """What a projection makes of rows."""

    vectors: Tensor
    """[S, D] unit vectors."""
    lengths: Tensor
    """[S, 1] what they were divided by."""


class _Known(torch.autograd.Function):
    """A projection whose outputs are known: only the gradients of weight and bias are formed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, known: Unit) -> Tensor:
        ctx.save_for_backward(rows, *known)
        return known.vectors.view_as(known.vectors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor, None]:
        rows, *known = ctx.saved_tensors
        of_mapped = unit_backward(gradient, *known)
        return None, of_mapped.T @ rows.to(of_mapped), of_mapped.sum(0), None


class Projection(nn.Linear):
    """Rows as unit vectors in another space, computed in any format from rows of any device.

    Rows are first brought to the parameters' format.
    """

    def forward(
        self,
        rows: Tensor,
        dtype: torch.dtype | None = None,
        *,
        lengths: Tensor | None = None,
        known: Unit | None = None,
    ) -> Tensor:
        """[S, D_in] -> unit vectors [S, D_out].

        Args:
            rows: [S, D_in].
            dtype: In which it is computed; None: that of the parameters.
            lengths: [S, 1], gets what the vectors are divided by; where no gradient is wanted.
            known: What it gives without gradient, where that is known and the rows are not trained:
                it is not computed again.
        """
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        if rows.requires_grad and torch.is_grad_enabled():
            return F.normalize(self.mapped(rows, weight, bias), dim=-1)
        if known is None:
            with torch.no_grad():
                known = self._known(rows, weight, bias)
        if lengths is not None:
            lengths.copy_(known.lengths)
        if not torch.is_grad_enabled():
            return known.vectors
        return _Known.apply(rows, weight, bias, known)  # type: ignore[no-untyped-call, no-any-return]

    def _known(self, rows: Tensor, weight: Tensor, bias: Tensor) -> Unit:
        by_kernel = map_rows(rows, weight, bias)
        if by_kernel is not None:
            return Unit(*by_kernel)
        made = Unit(weight.new_empty(len(rows), len(weight)), weight.new_empty(len(rows), 1))
        parts = (torch.split(t, PROJECTED_ROWS) for t in (rows, *made))
        for block, vectors, lengths in zip(*parts, strict=True):
            mapped = self.mapped(block, weight, bias)
            lengths.copy_(mapped.norm(dim=-1, keepdim=True).clamp_min(SHORTEST))
            torch.div(mapped, lengths, out=vectors)
        return made

    def mapped(
        self, rows: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """[S, D_in] -> [S, D_out], not yet of unit length; by its own parameters, or the same in
        another format.
        """
        weight, bias = (weight, bias) if weight is not None else (self.weight, self.bias)
        return F.linear(rows.to(self.weight).to(weight), weight, bias)


class Once:
    """A projection that keeps what it made of the rows it was given last, in their own format."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.rows: Tensor | None = None
        self.unit: Tensor | None = None

    def __call__(self, rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Rows [S, D_m] -> unit vectors [S, D]."""
        if dtype is not None:
            return self.project(rows, dtype)
        if self.unit is None or self.rows is not rows:
            self.rows, self.unit = rows, self.project(rows)
        return self.unit


def _narrows(query: Tensor) -> bool:
    """Whether only rows that some query keeps go on from a shortlist: where gradients cost more
    than projecting those rows twice. A GPU would have to be asked how many there are.
    """
    return torch.is_grad_enabled() and query.device.type == "cpu"


class UserGuided(Selector):
    """Scores the rows of one table against user queries and keeps the best K of each.

    Kept tokens have soft weights, so that a gradient always reaches the filter. The search runs
    without gradient; what is kept is scored again with it.
    """

    log_temperature: Tensor
    salt: Tensor
    updates: Tensor
    """[1] updates of the run so far; only where there is noise, which depends on them."""

    def __init__(
        self, config: FilterConfig, num_rows: int, table_dim: int, hidden_dim: int
    ) -> None:
        super().__init__(config, num_rows, table_dim, hidden_dim)
        self.config, self.num_kept = config, config.num_kept(num_rows)
        self.projection = Projection(table_dim, hidden_dim)
        nn.init.normal_(self.projection.weight, std=table_dim**-0.5)
        nn.init.zeros_(self.projection.bias)
        log_temperature = torch.tensor([math.log(config.temperature)])
        if config.learn_temperature:
            self.log_temperature = nn.Parameter(log_temperature)
        else:
            self.register_buffer("log_temperature", log_temperature, persistent=False)
        if config.noise:  # the salt follows from the run's seed, as all that is drawn here does
            self.register_buffer("salt", torch.randint(LARGEST, (1,)))
            self.register_buffer("updates", torch.zeros(1, dtype=torch.int64))
        is_part = config.shortlist_size is not None and config.shortlist_size < num_rows
        self.shortlist = Shortlist(config.shortlist_size or 0) if is_part else None

    @staticmethod
    def rows_kept(config: FilterConfig, num_rows: int) -> int:
        """K."""
        return config.num_kept(num_rows)

    @property
    def uses_shortlist(self) -> bool:
        """Whether the table is searched in part only."""
        return self.shortlist is not None

    def log_tau(self) -> Tensor:
        """[1] log tau_s."""
        return self.log_temperature

    @property
    def temperature(self) -> Tensor:
        """tau_s, [1]."""
        return self.log_temperature.exp()

    @property
    def reads_keys(self) -> bool:
        """Where there is noise."""
        return bool(self.config.noise)

    @property
    def draws_noise(self) -> bool:
        """Whether noise, where there is any, joins the scores now."""
        return self.training

    def project(self, rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Table rows [S, D_m] -> unit vectors in the user space [S, D], computed in ``dtype``."""
        unit: Tensor = self.projection(rows, dtype)
        return unit

    def forward(self, queries: Queries, table: PlacedTable) -> Selection:
        """Keep the K rows of highest score (cosine + noise) / tau_s for each query."""
        query, keys = queries.vectors, queries.keys
        if self.shortlist is not None:
            rows, row_ids = self.shortlist.candidates(table), self.shortlist.row_ids
            return self.select(queries, rows, row_ids, self.noise(keys, row_ids))
        noise = None
        if self.config.noise:
            noise = self.noise(keys, torch.arange(table.num_rows, device=query.device))
        with torch.no_grad():
            selected = table.search(query, self.project, self.num_kept, noise)  # [G, K]
        row_ids, kept = those_kept(selected, table.num_rows)
        noise = None if noise is None else noise._replace(row_ids=row_ids)
        return self.select(queries, table.take(row_ids), row_ids, noise, kept)

    def select(
        self,
        queries: Queries,
        rows: Tensor,
        row_ids: Tensor,
        noise: GumbelNoise | None = None,
        kept: Tensor | None = None,
    ) -> Selection:
        """Keep K of the candidates ``rows`` [S, D_m] for each query; ``kept`` [G, K] where a search
        has found them.
        """
        unit_query, known = queries.unit, None
        if kept is None and _narrows(unit_query):
            with torch.no_grad():
                lengths = unit_query.new_empty(len(rows), 1)
                known = Unit(self.projection(rows, lengths=lengths), lengths)
                selected = search(unit_query, known.vectors, self.num_kept, noise)
            used, kept = those_kept(selected, len(rows))
            if len(used) > WORTH_A_COPY * len(rows):
                kept = selected
            else:
                known = Unit(*(t.index_select(0, used) for t in known))
                rows, row_ids = rows.index_select(0, used), row_ids.index_select(0, used)
                noise = None if noise is None else noise._replace(row_ids=row_ids)
        unit_rows = self.project(rows) if known is None else self.projection(rows, known=known)
        if kept is None:
            with torch.no_grad():
                kept = search(unit_query, unit_rows, self.num_kept, noise)
        drawn = None if noise is None else noise.at(kept).to(unit_query.dtype)
        log_weights = weigh_kept(unit_query, unit_rows, kept, self.temperature, drawn)
        return Selection(rows, row_ids, kept, log_weights)

    def fixed_rows(self, table: PlacedTable) -> Tensor | None:
        """Those of the shortlist; a whole table is searched anew for every batch."""
        return None if self.shortlist is None else self.shortlist.candidates(table)

    def noise(self, keys: Tensor | None, row_ids: Tensor) -> GumbelNoise | None:
        """Keyed by (seed, step, user, table); the user is known by the history, for the model has
        no user ids.
        """
        if not self.config.noise or not self.draws_noise:
            return None
        updates = int(self.updates)
        scale = self.config.noise_scale(updates)
        if scale == 0:
            return None
        assert keys is not None
        return GumbelNoise(mix(keys ^ self.salt ^ mix(keys.new_tensor(updates))), row_ids, scale)

    def refresh(self, queries: list[Tensor], table: PlacedTable, reduce: Reduce) -> Tensor | None:
        """Choose the shortlist anew."""
        if self.shortlist is None:
            return None
        project, needed = Once(self.project), len(self.shortlist.row_ids)
        # Of the outgoing list, on users that it was not made from.
        first = queries[0][:RECALL_QUERIES]
        recall = self.shortlist.recall(first, table, project, self.num_kept, reduce)
        relevance = [table.relevance(some, project, needed) for some in queries]
        of_all = reduce.max(torch.stack(relevance).amax(0))
        in_doubt = self.shortlist.in_doubt(of_all, TOLERANCE[queries[0].dtype])
        rows = table.take(in_doubt)
        exact = [row_relevance(some, rows, project, torch.float64) for some in queries]
        of_all[in_doubt] = reduce.max(torch.stack(exact).amax(0)).to(of_all)
        self.shortlist.choose(of_all)
        return recall

    def forget(self) -> None:
        """Fetch the shortlist's rows anew."""
        if self.shortlist is not None:
            self.shortlist.forget()

    def after_update(self) -> None:
        """Noise is another at the next update."""
        if self.config.noise:
            self.updates += 1
