"""User-guided token filtering (docs/method.md): the rows of a table nearest to a user's history,
with soft weights.

Shapes: G queries, S candidate rows of one table, V_m x D_m the table, D hidden size, K kept tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mltfr_dist.config import FilterConfig
from mltfr_dist.models.draws import LARGEST, GumbelNoise, mix
from mltfr_dist.models.kernels import weigh_kept
from mltfr_dist.models.placed_table import PlacedTable
from mltfr_dist.models.projection import Once, Projection, Unit
from mltfr_dist.models.relevance import row_relevance
from mltfr_dist.models.search import TOLERANCE, search
from mltfr_dist.models.selectors.base import Queries, Reduce, Selection, Selector, those_kept
from mltfr_dist.models.selectors.shortlist import RECALL_QUERIES, Shortlist

WORTH_A_COPY = 0.8
"""Share of a shortlist's rows that queries keep up to which these alone go on: a copy of more costs
more than it saves.
"""


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
    _known_updates: int | None = 0
    """The same; None where a state was loaded and its number not yet asked for, which a GPU is
    waited for.
    """

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
            self.register_load_state_dict_post_hook(_ask_anew)  # type: ignore[no-untyped-call]
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
        row_ids, kept = those_kept(selected, table.num_rows, are_at_hand=table.is_at_hand)
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
        if self._known_updates is None:
            self._known_updates = int(self.updates)
        scale = self.config.noise_scale(self._known_updates)
        if scale == 0:
            return None
        assert keys is not None
        return GumbelNoise(mix(keys ^ self.salt ^ mix(self.updates)), row_ids, scale)

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
            if self._known_updates is not None:
                self._known_updates += 1


def _ask_anew(selector: UserGuided, _: object) -> None:
    """Another state has been loaded."""
    selector._known_updates = None
