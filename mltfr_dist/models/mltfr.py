"""MLTFR (docs/method.md): filter, experts, router and consensus, added to a backbone's block 0.

Shapes: B users, L positions, n positions a query block, G blocks that hold a real position, D
hidden size, N real positions, M tables, V_m x D_m table m, K kept rows, E experts (of a gate, with
the null expert).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mltfr_dist.config import ExpertConfig, MLTFRConfig
from mltfr_dist.models.at_once import Parts, all_alike, read_at_once
from mltfr_dist.models.consensus import State, freeze
from mltfr_dist.models.experts import ExpertCore, ExpertRows, Experts, shared_experts
from mltfr_dist.models.kernels import mix
from mltfr_dist.models.packing import Packing
from mltfr_dist.models.placed_table import PlacedTable
from mltfr_dist.models.query_blocks import QueryBlocks
from mltfr_dist.models.router import Router, router_class
from mltfr_dist.models.routing import Routing
from mltfr_dist.models.selectors import Queries, Reduce, Selection, Selector, selector_class


class Components(NamedTuple):
    """What MLTFR is put together from, beside its configuration; the published form has others."""

    blocks: Callable[[Tensor, Packing, int], QueryBlocks] = QueryBlocks
    selector: type[Selector] | None = None
    """None: that of the strategy."""
    experts: Callable[[ExpertConfig, int, Sequence[int]], Experts] = shared_experts
    router: type[Router] | None = None
    """None: that of its name."""
    shared: Callable[[ExpertRows], ExpertRows] = lambda attended: attended
    """An expert's rows, seen by the whole batch."""
    of_consensus: Callable[[list[ExpertRows]], list[ExpertRows]] = lambda attended: attended
    """What the consensus expert attends to, of its members' rows."""
    consensus: type[ExpertCore] = ExpertCore


class MLTFR(nn.Module):
    """Reads token tables on behalf of a backbone, wherever their rows are held."""

    def __init__(
        self,
        config: MLTFRConfig,
        hidden_dim: int,
        tables: Sequence[PlacedTable],
        components: Components | None = None,
    ) -> None:
        """Args: config: MLTFR's; hidden_dim: D; tables: M tables; components: None:
        those of docs/method.md.
        """
        super().__init__()
        self.config, self.hidden_dim = config, hidden_dim
        self.components = components or Components()
        self.tables = nn.ModuleList(tables)
        self.num_tables, self.per_table = len(tables), config.expert.per_table
        self.num_experts = self.num_tables * self.per_table
        selector = self.components.selector or selector_class(config.filter.strategy)
        self.selectors = nn.ModuleList(
            selector(config.filter, t.num_rows, t.dim, hidden_dim) for t in tables
        )
        widths = [t.dim for t in tables for _ in range(self.per_table)]  # of the experts' tables
        self.adapters, self.cores = self.components.experts(config.expert, hidden_dim, widths)
        router = self.components.router or router_class(config.router.name)
        self.router = router(config.router, hidden_dim, self.num_experts)
        self.consensus: ExpertCore | None = None
        self.consensus_members: list[int] = []

    def table(self, m: int) -> PlacedTable:
        """Table m, V_m x D_m."""
        table = self.tables[m]
        assert isinstance(table, PlacedTable)
        return table

    def selector(self, m: int) -> Selector:
        """What chooses from table m."""
        selector = self.selectors[m]
        assert isinstance(selector, Selector)
        return selector

    def core(self, e: int) -> ExpertCore:
        """Core of expert e."""
        core = self.cores[e]
        assert isinstance(core, ExpertCore)
        return core

    def experts_of(self, tables: Sequence[int]) -> list[int]:
        """Experts that read ``tables``."""
        return [m * self.per_table + i for m in tables for i in range(self.per_table)]

    def gate_names(self, table_names: Sequence[str]) -> list[str]:
        """What the gates stand for, in their order: tables, or their experts where a table has
        several, or none.
        """
        count = self.per_table
        names = [
            name if count == 1 else f"{name}.{i}" for name in table_names for i in range(count)
        ]
        return names + ["none"] * self.config.router.null_expert

    def add_consensus(
        self, merged: State | None = None, tables: Sequence[int] | None = None
    ) -> None:
        """Add the consensus expert, frozen.

        Args:
            merged: Its parameters; None: a fresh initialisation.
            tables: Whose experts it merges, and whose rows it reads; None: all.
        """
        self.consensus_members = self.experts_of(
            range(self.num_tables) if tables is None else tables
        )
        width = self.core(self.consensus_members[0]).key.in_features
        consensus = self.components.consensus(self.config.expert, self.hidden_dim, width)
        self.consensus = consensus.train(self.training)
        freeze(self.consensus)
        if merged is not None:
            self.consensus.load_state_dict(merged)
        if self.config.consensus.learn_weight:
            self.consensus_weight = nn.Parameter(torch.tensor([self.config.consensus.weight]))

    def cast_frozen(self, dtype: torch.dtype) -> None:
        """Bring what is not trained, tables and consensus expert, to the format of the forward
        pass.

        Who casts a model casts parameters. The router's load stays in fp32, for it is a running
        sum.
        """
        for m in range(self.num_tables):
            self.selector(m).forget()
            self.table(m).cast(dtype)
        if self.consensus is not None:
            self.consensus.to(dtype)

    # --- forward -----------------------------------------------------------------------------

    def blocks(self, x: Tensor, packing: Packing) -> QueryBlocks:
        """The real positions [N, D] in blocks that share a query."""
        return self.components.blocks(x, packing, self.config.filter.query_every)

    def queries(self, blocks: QueryBlocks) -> Queries:
        """Those of the blocks, with their histories' hashes where any selector reads them."""
        reads = any(self.selector(m).reads_keys for m in range(self.num_tables))
        return Queries(blocks.queries, blocks.keys() if reads else None)

    def selections(self, queries: Queries) -> list[Selection]:
        """What each table contributes."""
        return [selector(queries, table) for selector, table in zip(self.selectors, self.tables)]

    def attended(self, selections: Sequence[Selection]) -> list[ExpertRows]:
        """What each expert attends to, of what its table contributes."""
        of_experts = [s for s in selections for _ in range(self.per_table)]
        return [
            self.components.shared(selection.attended(adapter))
            for selection, adapter in zip(of_experts, self.adapters, strict=True)
        ]

    def forward(self, x: Tensor, packing: Packing) -> tuple[Tensor, Routing]:
        """What is added to block 0's output: sum_m pi_m E_m + lambda C.

        Args:
            x: [N, D] input embeddings of the real positions.
            packing: Where they stand, and the histories themselves, which only random draws read:
                strategy random_tokens, and noise.

        Returns:
            [N, D], and what is known of the gate and the filters.
        """
        blocks = self.blocks(x, packing)
        queries = self.queries(blocks)
        parts = self._parts if self.training else None  # what is folded stays equal to the bit
        if parts is not None and all_alike(parts, x.device):
            read = read_at_once(parts, blocks.positions, queries)
            mixed, gate = blocks.at_real(read.mixed), blocks.at_real(read.gate)
            weights, real = read.log_weights.detach().exp(), None
            if packing.room:
                real = blocks.are_real
                gate, weights = gate * packing.are_real[:, None], weights * real[:, None, None]
            return mixed, Routing(gate, list(weights.unbind(1)), len(weights), real)
        selections = self.selections(queries)
        attended = self.attended(selections)
        num_blocks = blocks.queries.shape[0]  # not `len`, which is no symbol in an export
        packed = blocks.packed if self._reads_in_place(x, attended, num_blocks) else None
        positions = blocks.positions if packed is None else x
        outputs = [self.core(e).output(positions, [m], packed) for e, m in enumerate(attended)]
        gate = self.router(positions)  # [G, n, E] or [N, E]
        of_experts, masks = zip(*outputs, strict=True)
        places = None if packed is None else packed.places
        mixed = mix(of_experts, masks, gate[..., : self.num_experts], places)
        if self.consensus is not None:
            members = self.components.of_consensus([attended[e] for e in self.consensus_members])
            mixed = mixed + self._lambda() * self.consensus(positions, members, packed)
        if packed is None:
            mixed, gate = blocks.at_real(mixed), blocks.at_real(gate)
        kept = [selection.weights().detach() for selection in selections]
        return mixed, Routing(gate, kept, num_blocks)

    def _reads_in_place(self, x: Tensor, attended: list[ExpertRows], num_blocks: int) -> bool:
        """Whether all experts take positions as they are packed, without padding: where kernels
        read what is kept, and nothing is drawn for whole blocks.
        """
        if self.config.router.expert_dropout and self.training:
            return False
        experts = [self.core(e) for e in range(self.num_experts)]
        experts += [] if self.consensus is None else [self.consensus]
        return all(expert.reads_in_place(x, attended, num_blocks) for expert in experts)

    def fetch(self) -> None:
        """Have at hand the rows that are searched; every process must call where a step would."""
        for m in range(self.num_tables):
            self.selector(m).fixed_rows(self.table(m))

    def reads_at_once(self, device: torch.device) -> bool:
        """Whether training reads all tables' shortlists in one pass on ``device``."""
        parts = self._parts
        return parts is not None and all_alike(parts, device) and parts.have_shortlists

    @property
    def _parts(self) -> Parts | None:
        """None where it is put together in another way."""
        if self.components != Components():
            return None
        tables = [self.table(m) for m in range(self.num_tables)]
        assert isinstance(self.router, Router)
        return Parts(
            tables,
            [*self.selectors],
            [*self.adapters],
            [*self.cores],
            self.router,
            self.consensus,
            self.consensus_members,
            0.0 if self.consensus is None else self._lambda(),
        )

    def _lambda(self) -> Tensor | float:
        consensus = self.config.consensus
        return self.consensus_weight if consensus.learn_weight else consensus.weight

    # --- around an update ----------------------------------------------------------------------

    @property
    def uses_shortlist(self) -> bool:
        """Whether any table is searched in part only."""
        return any(self.selector(m).uses_shortlist for m in range(self.num_tables))

    @torch.no_grad()
    def refresh(self, inputs: list[tuple[Tensor, Packing]], reduce: Reduce) -> Tensor:
        """Choose anew what is searched of each table; every process must call.

        Args:
            inputs: Input embeddings [N, D] of each micro-batch of this process, and where they
                stand.
            reduce: Combines what processes have.

        Returns:
            [M] share of the exact top K that the outgoing lists hold; 1 for a table that is
            searched whole.
        """
        queries = [self.blocks(*pair).queries for pair in inputs]
        recalls = [
            self.selector(m).refresh(queries, self.table(m), reduce) for m in range(self.num_tables)
        ]
        return torch.cat([torch.ones(1).double() if r is None else r.cpu() for r in recalls])

    def after_update(self, gate_weights: Tensor | None) -> None:
        """Note that an update is over.

        Args:
            gate_weights: [E] mean over the global batch; None where the update was skipped.
        """
        if gate_weights is not None:
            self.router.update_load(gate_weights)
        for m in range(self.num_tables):
            self.selector(m).after_update()
