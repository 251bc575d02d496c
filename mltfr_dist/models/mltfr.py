"""MLTFR in repaired form (docs/method.md): filter, experts, router and consensus, added to a backbone's block 0.

Shapes: B users, L positions, n positions a query block, G blocks that hold a real position, D hidden size,
M tables, V_m x D_m table m, S candidate rows of it, K kept tokens.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mltfr_dist.config import FilterConfig, MLTFRConfig
from mltfr_dist.models.consensus import State, freeze
from mltfr_dist.models.experts import ExpertCore, Memory, Router, TableAdapter
from mltfr_dist.models.strategies import AllRows, Prototypes, RandomTokens, Selection, history_keys
from mltfr_dist.models.token_filter import TokenFilter, prefix_mean, row_relevance, search

EXPLAINED = 16
"""Tokens that an explanation lists at most, where all of a table's rows are attended to."""


class RoutingStats(NamedTuple):
    """Sums over the real positions of a batch; ranks and micro-batches add."""

    gate_sum: Tensor
    """[M] gate weights."""
    top_sum: Tensor
    """[M] positions at which the expert has the largest gate weight."""
    entropy_sum: Tensor
    """[1] entropy of the gate, nats."""
    balance_sum: Tensor
    """[1] load-balancing term, with gradient."""


class Explanation(NamedTuple):
    """Why one position of one user looks as it does."""

    kept_ids: list[Tensor]
    """Per table: [K] row numbers of the kept tokens, best first."""
    kept_weights: list[Tensor]
    """Per table: [K] their weights, summing to 1."""
    gate_weights: Tensor
    """[M]."""


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
    """Reads token tables on behalf of a backbone. Tables are buffers outside the state: never trained, never saved."""

    def __init__(self, config: MLTFRConfig, hidden_dim: int, table_rows: list[Tensor]) -> None:
        super().__init__()
        self.config = config
        self.block_len = config.filter.query_every
        self.num_tables = len(table_rows)
        for m, rows in enumerate(table_rows):
            whole = config.filter.strategy != "user_guided" or config.filter.shortlist_size is None
            size = len(rows) if whole else min(config.filter.shortlist_size or 0, len(rows))
            self.register_buffer(f"table_{m}", rows, persistent=False)
            self.register_buffer(f"shortlist_{m}", torch.arange(size), persistent=size < len(rows))
        self.filters = nn.ModuleList(make_filter(config.filter, len(r), r.shape[1], hidden_dim) for r in table_rows)
        self.adapters = nn.ModuleList(TableAdapter(r.shape[1], hidden_dim) for r in table_rows)
        core = ExpertCore(config.expert, hidden_dim)
        self.cores = nn.ModuleList(copy.deepcopy(core) for _ in table_rows)
        self.router = Router(hidden_dim, self.num_tables)
        self.consensus: ExpertCore | None = None

    # --- tables ------------------------------------------------------------------------------------------------

    def table(self, m: int) -> Tensor:
        """Rows of table m, [V_m, D_m]."""
        return self.get_buffer(f"table_{m}")

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
        return any(len(self.shortlist(m)) < len(self.table(m)) for m in range(self.num_tables))

    def candidates(self, m: int) -> Tensor:
        """Rows of table m that are searched, [S, D_m]."""
        if len(self.shortlist(m)) == len(self.table(m)):
            return self.table(m)
        return self.table(m)[self.shortlist(m)]

    def add_consensus(self, merged: State | None = None) -> None:
        """Add the consensus expert, frozen: with parameters ``merged``, or to be loaded from a checkpoint."""
        self.consensus = copy.deepcopy(self.cores[0])  # type: ignore[assignment]
        assert self.consensus is not None
        freeze(self.consensus)
        if merged is not None:
            self.consensus.load_state_dict(merged)

    def cast_frozen(self, dtype: torch.dtype) -> None:
        """Bring what is not trained, tables and consensus expert, to the format of the forward pass.

        DeepSpeed casts parameters only. The router's load stays in fp32, for it is a running sum.
        """
        for m in range(self.num_tables):
            self.register_buffer(f"table_{m}", self.table(m).to(dtype), persistent=False)
        if self.consensus is not None:
            self.consensus.to(dtype)

    # --- forward -----------------------------------------------------------------------------------------------

    def blocks(self, x: Tensor, valid_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Cut positions into blocks that share a query.

        Args:
            x: [B, L, D] input embeddings.
            valid_mask: [B, L].

        Returns:
            Positions [G, n, D], their queries [G, D] (prefix mean at the block's first position: causal for all of
            it), and the mask [B, ceil(L / n)] of blocks that hold a real position.
        """
        n = self.block_len
        pad = -x.shape[1] % n
        queries = F.pad(prefix_mean(x, valid_mask), (0, 0, 0, pad))[:, ::n]  # [B, L/n, D]
        occupied = in_blocks(F.pad(valid_mask, (0, pad)), n)[..., 0]  # sequences start at 0 and have no gaps
        positions = in_blocks(F.pad(x, (0, 0, 0, pad)), n)  # [B, L/n, n, D]
        return positions[occupied], queries[occupied], occupied

    def selections(self, queries: Tensor, keys: Tensor | None) -> list[Selection]:
        """What each table contributes for ``queries`` [G, D] of histories with hashes ``keys`` [G]."""
        return [self._select(m, queries, keys) for m in range(self.num_tables)]

    def _select(self, m: int, queries: Tensor, keys: Tensor | None) -> Selection:
        if isinstance(self.filters[m], TokenFilter):
            rows = self.candidates(m)
            return Selection(rows, self.shortlist(m), self.filters[m](queries, rows))
        selection = self.filters[m](keys, self.table(m))
        assert isinstance(selection, Selection)
        return selection

    def block_keys(self, item_ids: Tensor | None, occupied: Tensor) -> Tensor | None:
        """[G] hash of each block's history up to its first position; None where no history is given."""
        return None if item_ids is None else history_keys(item_ids)[:, :: self.block_len][occupied]

    def forward(self, x: Tensor, valid_mask: Tensor, item_ids: Tensor | None = None) -> tuple[Tensor, RoutingStats]:
        """Input embeddings [B, L, D] -> what is added to block 0's output [B, L, D] (zero at padding), and sums.

        Args:
            x: [B, L, D].
            valid_mask: [B, L].
            item_ids: [B, L] the history itself, which only the strategy random_tokens reads.
        """
        positions, queries, occupied = self.blocks(x, valid_mask)
        memories = [
            Memory(self.adapters[m](selection.rows), *selection.kept)
            for m, selection in enumerate(self.selections(queries, self.block_keys(item_ids, occupied)))
        ]
        expert_outputs = torch.stack([core(positions, [memories[m]]) for m, core in enumerate(self.cores)], dim=-1)
        gate_weights = self.router(positions)  # [G, n, M]
        output = torch.einsum("gndm,gnm->gnd", expert_outputs, gate_weights)
        if self.consensus is not None:
            output = output + self.config.consensus.weight * self.consensus(positions, memories)
        spread = output.new_zeros(*occupied.shape, self.block_len, x.shape[-1])  # [B, L/n, n, D]
        spread[occupied] = output
        added = spread.flatten(1, 2)[:, : x.shape[1]] * valid_mask[..., None]
        real = in_blocks(F.pad(valid_mask, (0, -x.shape[1] % self.block_len)), self.block_len)[occupied]
        return added, self._stats(gate_weights[real])

    def _stats(self, gate_weights: Tensor) -> RoutingStats:
        detached = gate_weights.detach().float()  # [N, M]
        top = F.one_hot(detached.argmax(-1), self.num_tables).float()
        entropy = -(detached * detached.clamp(min=1e-12).log()).sum().view(1)
        return RoutingStats(detached.sum(0), top.sum(0), entropy, self.router.balance_loss(gate_weights).view(1))

    # --- shortlist and explanation -----------------------------------------------------------------------------

    @torch.no_grad()
    def relevance(self, x: Tensor, valid_mask: Tensor) -> list[Tensor]:
        """Per table, [V_m] largest cosine of each row with any query of the batch; ranks reduce by maximum."""
        _, queries, _ = self.blocks(x, valid_mask)
        unit_queries = F.normalize(queries, dim=-1)
        return [row_relevance(unit_queries, f.project(self.table(m))).float() for m, f in enumerate(self.filters)]  # type: ignore[operator]

    @torch.no_grad()
    def set_shortlist(self, relevance: list[Tensor]) -> None:
        """Search from now on the rows of highest ``relevance`` (ties: lower row number), in row order."""
        for m, values in enumerate(relevance):
            best = values.sort(descending=True, stable=True).indices[: len(self.shortlist(m))]
            self.shortlist(m).copy_(best.sort().values)

    @torch.no_grad()
    def shortlist_recall(self, x: Tensor, valid_mask: Tensor, max_queries: int = 64) -> tuple[Tensor, int]:
        """How much of an exact search the shortlist finds.

        Returns:
            [M] sums over queries of the share of the true top K that is in the shortlist, and the number of queries.
        """
        _, queries, _ = self.blocks(x, valid_mask)
        unit_queries = F.normalize(queries[:max_queries], dim=-1)
        sums = []
        for m, token_filter in enumerate(self.filters):
            exact = search(unit_queries, token_filter.project(self.table(m)), token_filter.num_kept)  # type: ignore[operator,arg-type]
            sums.append(torch.isin(exact, self.shortlist(m)).float().mean(1).sum())
        return torch.stack(sums), len(unit_queries)

    @torch.no_grad()
    def explain(self, x: Tensor, valid_mask: Tensor, item_ids: Tensor | None = None) -> list[Explanation]:
        """Kept tokens and gate weights at the last real position of each user; arguments as of :meth:`forward`."""
        positions, queries, occupied = self.blocks(x, valid_mask)
        selections = self.selections(queries, self.block_keys(item_ids, occupied))
        gate_weights = self.router(positions)
        last = valid_mask.sum(1) - 1  # [B]
        block_number = torch.full(occupied.shape, -1, device=x.device)
        block_number[occupied] = torch.arange(len(positions), device=x.device)
        explanations = []
        for user, position in enumerate(last.tolist()):
            g = int(block_number[user, position // self.block_len])
            ids, weights = [], []
            for row_ids, kept in ((s.row_ids, s.kept) for s in selections):
                ids.append(row_ids[:EXPLAINED] if kept.places is None else row_ids[kept.places[g]])
                weights.append(kept.log_weights[0 if kept.places is None else g, : len(ids[-1])].float().exp())
            explanations.append(Explanation(ids, weights, gate_weights[g, position % self.block_len].float()))
        return explanations
