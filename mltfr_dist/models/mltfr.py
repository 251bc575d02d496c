"""MLTFR (docs/method.md): filter, experts, router and consensus, added to a backbone's block 0.

Repaired by default; every published defect is a value of a field (`mltfr_dist/repairs.py`).

Shapes: B users, L positions, n positions a query block, G blocks that hold a real position, D hidden size,
M tables, V_m x D_m table m, S candidate rows of it, K kept tokens, E experts (of a gate, with the null expert).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mltfr_dist.config import FilterConfig, MLTFRConfig
from mltfr_dist.data.batch import lengths
from mltfr_dist.models.consensus import State, freeze
from mltfr_dist.models.draws import GumbelNoise, history_keys, mix
from mltfr_dist.models.experts import ExpertCore, Memory, Router, TableAdapter, mean_memory, pooled
from mltfr_dist.models.routing_stats import RoutingStats, routing_stats
from mltfr_dist.models.strategies import AllRows, Prototypes, RandomTokens, Selection
from mltfr_dist.models.table_rows import TableRows
from mltfr_dist.models.token_filter import TokenFilter, prefix_mean

EXPLAINED = 16
"""Tokens that an explanation lists at most, where all of a table's rows are attended to."""


class Explanation(NamedTuple):
    """Why one position of one user looks as it does."""

    kept_ids: list[Tensor]
    """Per table: [K] row numbers of the kept tokens, best first."""
    kept_weights: list[Tensor]
    """Per table: [K] their weights, summing to 1."""
    gate_weights: Tensor
    """[M], of each table's experts together; they sum to 1 unless there is a null expert, which has the rest."""


def in_blocks(t: Tensor, block_len: int) -> Tensor:
    """[B, L, ...] -> [B, L / n, n, ...]."""
    return t.view(t.shape[0], -1, block_len, *t.shape[2:])


def make_filter(config: FilterConfig, num_rows: int, table_dim: int, hidden_dim: int) -> nn.Module:
    """What chooses from a table of ``num_rows`` rows."""
    if config.strategy == "user_guided":
        return TokenFilter(config, num_rows, table_dim, hidden_dim)
    if config.strategy == "random_tokens":
        return RandomTokens(config.num_kept(num_rows))
    if config.strategy == "learned_prototypes":
        return Prototypes(num_rows, config.num_prototypes)
    return AllRows()  # direct; seed_words, whose tables hold nothing else


class MLTFR(nn.Module):
    """Reads token tables on behalf of a backbone, wherever their rows are held."""

    def __init__(
        self, config: MLTFRConfig, hidden_dim: int, table_rows: Sequence[Tensor | TableRows]
    ) -> None:
        """Args: config: MLTFR's; hidden_dim: D; table_rows: Tables in memory [V_m, D_m], or placed otherwise."""
        super().__init__()
        trained = config.train_tables
        tables = [TableRows(t, trained=trained) if isinstance(t, Tensor) else t for t in table_rows]
        self.tables = nn.ModuleList(tables)
        self.config, self.hidden_dim = config, hidden_dim
        self.num_tables, self.per_table = len(tables), config.expert.per_table
        self.num_experts = self.num_tables * self.per_table
        self.step = 0
        """Updates made so far in the run, for what changes with them; whoever trains sets it."""
        for m, table in enumerate(tables):
            whole = config.filter.strategy != "user_guided" or config.filter.shortlist_size is None
            size = (
                table.num_rows if whole else min(config.filter.shortlist_size or 0, table.num_rows)
            )
            self.register_buffer(
                f"shortlist_{m}", torch.arange(size), persistent=size < table.num_rows
            )
            self.register_buffer(f"candidates_{m}", None, persistent=False)
        self.register_load_state_dict_post_hook(lambda mltfr, _: mltfr.forget_candidates())  # type: ignore[no-untyped-call]
        self.filters = nn.ModuleList(
            make_filter(config.filter, t.num_rows, t.dim, hidden_dim) for t in tables
        )
        widths = [t.dim for t in tables for _ in range(self.per_table)]  # of the experts' tables
        if config.expert.form == "core":
            self.adapters = nn.ModuleList(TableAdapter(width, hidden_dim) for width in widths)
            core = self.new_core(hidden_dim)
            self.cores = nn.ModuleList(copy.deepcopy(core) for _ in widths)
        else:
            self.adapters = nn.ModuleList(nn.Identity() for _ in widths)
            self.cores = nn.ModuleList(self.new_core(width) for width in widths)
        self.router = Router(config.router, hidden_dim, self.num_experts)
        self.consensus: ExpertCore | None = None
        self.consensus_members: list[int] = []

    def experts_of(self, tables: Sequence[int]) -> list[int]:
        """Experts that read ``tables``."""
        return [m * self.per_table + i for m in tables for i in range(self.per_table)]

    def new_core(self, memory_dim: int) -> ExpertCore:
        """A freshly initialised expert."""
        return ExpertCore(self.config.expert, self.hidden_dim, memory_dim)

    def gate_names(self, table_names: Sequence[str]) -> list[str]:
        """What the gates stand for, in their order: tables, or their experts where a table has several, or none."""
        count = self.per_table
        names = [
            name if count == 1 else f"{name}.{i}" for name in table_names for i in range(count)
        ]
        return names + ["none"] * self.config.router.null_expert

    # --- tables ------------------------------------------------------------------------------------------------

    def table(self, m: int) -> TableRows:
        """Table m, V_m x D_m."""
        table = self.tables[m]
        assert isinstance(table, TableRows)
        return table

    def shortlist(self, m: int) -> Tensor:
        """Row numbers of table m that are searched, [S]."""
        return self.get_buffer(f"shortlist_{m}")

    def log_temperature(self, m: int) -> Tensor | None:
        """Logarithm of the filter temperature of table m, [1] (sharded under ZeRO-3); None where it has none."""
        if not isinstance(self.filters[m], TokenFilter):
            return None
        log_temperature = self.filters[m].log_temperature
        assert isinstance(log_temperature, Tensor)
        return log_temperature

    @property
    def uses_shortlist(self) -> bool:
        """Whether any table is searched in part only."""
        return any(self.has_shortlist(m) for m in range(self.num_tables))

    def has_shortlist(self, m: int) -> bool:
        """Whether table m is searched in part only."""
        return len(self.shortlist(m)) < self.table(m).num_rows

    def candidates(self, m: int) -> Tensor:
        """Rows of the shortlist of table m, [S, D_m]; fetched once for each list, so that a step needs no other rank's."""
        if self.config.train_tables:
            return self.table(m).take(self.shortlist(m))
        if getattr(self, f"candidates_{m}") is None:
            setattr(self, f"candidates_{m}", self.table(m).take(self.shortlist(m)))
        return self.get_buffer(f"candidates_{m}")

    def forget_candidates(self) -> None:
        """Fetch the shortlists' rows anew when they are next needed; every rank must do so at the same point."""
        for m in range(self.num_tables):
            setattr(self, f"candidates_{m}", None)

    def add_consensus(
        self, merged: State | None = None, tables: Sequence[int] | None = None
    ) -> None:
        """Add the consensus expert, frozen.

        Args:
            merged: Its parameters; None: a fresh initialisation, to be loaded from a checkpoint (or, published, kept).
            tables: Whose experts it merges, and whose memories it reads; None: all.
        """
        self.consensus_members = self.experts_of(
            range(self.num_tables) if tables is None else tables
        )
        core = self.cores[self.consensus_members[0]]
        assert isinstance(core, ExpertCore)
        self.consensus = self.new_core(core.key.in_features).train(self.training)
        if not self.config.consensus.dropout:
            self.consensus.attention_dropout.p = self.consensus.output_dropout.p = 0.0
        freeze(self.consensus)
        if merged is not None:
            self.consensus.load_state_dict(merged)
        if self.config.consensus.learn_weight:
            self.consensus_weight = nn.Parameter(torch.tensor([self.config.consensus.weight]))

    def cast_frozen(self, dtype: torch.dtype) -> None:
        """Bring what is not trained, tables and consensus expert, to the format of the forward pass.

        DeepSpeed casts parameters only. The router's load stays in fp32, for it is a running sum.
        """
        self.forget_candidates()
        for m in range(self.num_tables):
            self.table(m).cast(dtype)
        if self.consensus is not None:
            self.consensus.to(dtype)

    # --- forward -----------------------------------------------------------------------------------------------

    def block_length(self, length: int) -> int:
        """Positions that share one query, of histories of ``length``."""
        return length if self.config.filter.query == "history" else self.config.filter.query_every

    def of_queries(self, t: Tensor) -> Tensor:
        """What stands where the queries are taken: [B, L, ...] -> [B, ceil(L / n), ...]."""
        return (
            t[:, -1:]
            if self.config.filter.query == "history"
            else t[:, :: self.config.filter.query_every]
        )

    def blocks(self, x: Tensor, valid_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cut positions into blocks that share a query.

        Args:
            x: [B, L, D] input embeddings.
            valid_mask: [B, L].

        Returns:
            Positions [G, n, D], their queries [G, D] (prefix mean at the block's first position: causal for all of
            it; published: the mean of the whole history), and the mask [B, ceil(L / n)] of blocks that hold a real
            position.
        """
        n = self.block_length(x.shape[1])
        pad = -x.shape[1] % n
        queries = self.of_queries(prefix_mean(x, valid_mask))  # [B, L/n, D]
        occupied = in_blocks(F.pad(valid_mask, (0, pad)), n)[
            ..., 0
        ]  # sequences start at 0 and have no gaps
        positions = in_blocks(F.pad(x, (0, 0, 0, pad)), n)  # [B, L/n, n, D]
        return positions[occupied], queries[occupied], occupied

    def selections(self, queries: Tensor, keys: Tensor | None) -> list[Selection]:
        """What each table contributes for ``queries`` [G, D] of histories with hashes ``keys`` [G]."""
        return [self._select(m, queries, keys) for m in range(self.num_tables)]

    def _select(self, m: int, queries: Tensor, keys: Tensor | None) -> Selection:
        token_filter = self.filters[m]
        if not isinstance(token_filter, TokenFilter):
            selection = token_filter(keys, self.table(m))
            assert isinstance(selection, Selection)
            return selection
        row_ids = self.shortlist(m)
        noise = self._noise(token_filter, keys, row_ids)
        if self.has_shortlist(m):
            rows = self.candidates(m)
        elif token_filter.weights == "straight_through":
            rows = self.table(m).whole()
        else:
            return self._exact(m, token_filter, queries, noise)
        return Selection(rows, row_ids, token_filter(queries, rows, noise))

    def _exact(
        self, m: int, token_filter: TokenFilter, queries: Tensor, noise: GumbelNoise | None
    ) -> Selection:
        """Search the whole table without gradient, fetch the rows that any query keeps, and weigh those with it."""
        with torch.no_grad():
            found = self.table(m).search(
                queries, token_filter.project, token_filter.num_kept, noise
            )  # [G, K]
        row_ids, places = torch.unique(found, return_inverse=True)
        rows = self.table(m).take(row_ids)
        noise = None if noise is None else noise._replace(row_ids=row_ids)
        return Selection(rows, row_ids, token_filter(queries, rows, noise, places))

    def _noise(
        self, token_filter: TokenFilter, keys: Tensor | None, row_ids: Tensor
    ) -> GumbelNoise | None:
        """Keyed by (seed, step, user, table); the user is known by the history, for the model has no user ids."""
        config = self.config.filter
        scale = config.noise_scale(self.step)
        if scale == 0 or not (self.training or config.noise_in_evaluation):
            return None
        assert keys is not None
        return GumbelNoise(
            mix(keys ^ token_filter.get_buffer("salt") ^ mix(keys.new_tensor(self.step))),
            row_ids,
            scale,
        )

    def block_keys(self, item_ids: Tensor | None, occupied: Tensor) -> Tensor | None:
        """[G] hash of each block's history up to where its query is taken; None where no history is given."""
        return None if item_ids is None else self.of_queries(history_keys(item_ids))[occupied]

    def memories(self, selections: Sequence[Selection]) -> list[Memory]:
        """What each expert attends to, of what its table contributes."""
        found = []
        for e, selection in enumerate(s for s in selections for _ in range(self.per_table)):
            memory = Memory(self.adapters[e](selection.rows), *selection.kept)
            found.append(pooled(memory) if self.config.filter.memory == "batch" else memory)
        return found

    def forward(
        self, x: Tensor, valid_mask: Tensor, item_ids: Tensor | None = None
    ) -> tuple[Tensor, RoutingStats]:
        """Input embeddings [B, L, D] -> what is added to block 0's output [B, L, D] (zero at padding), and sums.

        Args:
            x: [B, L, D].
            valid_mask: [B, L].
            item_ids: [B, L] the history itself, which only random draws read: strategy random_tokens, and noise.
        """
        positions, queries, occupied = self.blocks(x, valid_mask)
        selections = self.selections(queries, self.block_keys(item_ids, occupied))
        memories = self.memories(selections)
        expert_outputs = torch.stack(
            [core(positions, [memories[e]]) for e, core in enumerate(self.cores)], dim=-1
        )
        gate_weights = self.router(positions)  # [G, n, E]
        output = torch.einsum(
            "gnde,gne->gnd", expert_outputs, gate_weights[..., : self.num_experts]
        )
        if self.consensus is not None:
            output = output + self._consensus_output(
                positions, [memories[e] for e in self.consensus_members]
            )
        n = self.block_length(x.shape[1])
        spread = output.new_zeros(*occupied.shape, n, x.shape[-1])  # [B, L/n, n, D]
        spread[occupied] = output
        added = spread.flatten(1, 2)[:, : x.shape[1]] * valid_mask[..., None]
        real = in_blocks(F.pad(valid_mask, (0, -x.shape[1] % n)), n)[occupied]
        return added, self._stats(gate_weights[real], selections, len(queries))

    def _consensus_output(self, positions: Tensor, memories: list[Memory]) -> Tensor:
        assert self.consensus is not None
        weight = (
            self.consensus_weight
            if self.config.consensus.learn_weight
            else self.config.consensus.weight
        )
        if self.config.expert.form == "paper":
            memories = [mean_memory(memories)]
        return weight * self.consensus(positions, memories)  # type: ignore[no-any-return]

    def _stats(
        self, gate_weights: Tensor, selections: Sequence[Selection] = (), num_queries: int = 0
    ) -> RoutingStats:
        balance = self.router.balance_loss(gate_weights)
        return routing_stats(gate_weights, balance, [s.kept for s in selections], num_queries)

    # --- shortlist and explanation -----------------------------------------------------------------------------

    @torch.no_grad()
    def relevance(self, x: Tensor, valid_mask: Tensor) -> list[Tensor]:
        """Per table, [V_m] largest cosine of each row with any query of the batch; ranks reduce by maximum."""
        _, queries, _ = self.blocks(x, valid_mask)
        return [self.table(m).relevance(queries, f.project) for m, f in enumerate(self.filters)]  # type: ignore[arg-type]

    @torch.no_grad()
    def set_shortlist(self, relevance: list[Tensor]) -> None:
        """Search from now on the rows of highest ``relevance`` (ties: lower row number), in row order."""
        for m, values in enumerate(relevance):
            best = values.sort(descending=True, stable=True).indices[: len(self.shortlist(m))]
            self.shortlist(m).copy_(best.sort().values)
        self.forget_candidates()

    @torch.no_grad()
    def shortlist_recall(
        self, x: Tensor, valid_mask: Tensor, max_queries: int = 64
    ) -> tuple[Tensor, int]:
        """How much of an exact search the shortlist finds.

        Returns:
            [M] sums over queries of the share of the true top K that is in the shortlist, and the number of queries.
        """
        _, queries, _ = self.blocks(x, valid_mask)
        queries = queries[:max_queries]
        sums = []
        for m, f in enumerate(self.filters):
            exact = self.table(m).search(queries, f.project, f.num_kept)  # type: ignore[arg-type]
            sums.append(torch.isin(exact, self.shortlist(m)).float().mean(1).sum())
        return torch.stack(sums), len(queries)

    @torch.no_grad()
    def explain(self, x: Tensor, valid_mask: Tensor, item_ids: Tensor) -> list[Explanation]:
        """Kept tokens and gate weights at the last real position of each user; arguments as of :meth:`forward`."""
        positions, queries, occupied = self.blocks(x, valid_mask)
        selections = self.selections(queries, self.block_keys(item_ids, occupied))
        gate_weights = self.router(positions)
        last, n = lengths(item_ids) - 1, self.block_length(x.shape[1])  # [B]
        block_number = torch.full(occupied.shape, -1, device=x.device)
        block_number[occupied] = torch.arange(len(positions), device=x.device)
        explanations = []
        for user, position in enumerate(last.tolist()):
            g = int(block_number[user, position // n])
            ids, weights = [], []
            for row_ids, kept in ((s.row_ids, s.kept) for s in selections):
                ids.append(row_ids[:EXPLAINED] if kept.places is None else row_ids[kept.places[g]])
                row = 0 if kept.places is None else g
                of_rows = kept.log_weights.exp() if kept.row_weights is None else kept.row_weights
                weights.append(of_rows[row, : len(ids[-1])].float())
            of_experts = gate_weights[g, position % n, : self.num_experts].float()
            explanations.append(
                Explanation(ids, weights, of_experts.view(self.num_tables, -1).sum(1))
            )
        return explanations
