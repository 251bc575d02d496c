"""Cross-attention experts over token tables, and the router that mixes them.

Shapes: G query blocks of n positions, K kept tokens, S candidate rows, H heads of size d, D hidden size, E experts
(or, of a memory, its width).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mltfr_dist.config import ExpertConfig, RouterConfig
from mltfr_dist.models.transformer import init_weights
from mltfr_dist.numerics import at_least_fp32


class Memory(NamedTuple):
    """What an expert attends to: candidate rows in its space of E dimensions, and which of them each query keeps."""

    rows: Tensor
    """[S, E] adapted candidate rows (form core: E = D), or the table's own (form paper: E = D_m)."""
    places: Tensor | None
    """[G, K] kept places in ``rows``; None: every query attends to all rows."""
    log_weights: Tensor
    """[G, K] the filter's log-weights; [1, S] where all rows are attended to."""
    row_weights: Tensor | None = None
    """[G, K] factors of the kept rows; None: rows as they are."""

    def gathered(self) -> Tensor:
        """[G, K, E] every query's kept rows, times their factors."""
        assert self.places is not None
        rows = F.embedding(self.places, self.rows)
        return rows if self.row_weights is None else rows * self.row_weights[..., None]


def pooled(memory: Memory) -> Memory:
    """One memory for the whole batch: what any query keeps, as often as it is kept (published: docs/method.md, D4)."""
    if memory.places is None:
        return memory
    if memory.row_weights is not None:
        rows = memory.gathered().flatten(0, 1)  # [G * K, E]
        return Memory(rows, None, memory.log_weights.flatten()[None])
    # A row that many queries keep is held once: in a softmax, weights of equal rows add up.
    present, inverse = torch.unique(memory.places, return_inverse=True)
    weights = at_least_fp32(memory.log_weights).exp()
    total = weights.new_zeros(len(present)).index_add(0, inverse.flatten(), weights.flatten())
    log_weights = total.clamp(min=torch.finfo(total.dtype).tiny).log().to(memory.log_weights.dtype)
    return Memory(F.embedding(present, memory.rows), None, log_weights[None])


def mean_memory(memories: list[Memory]) -> Memory:
    """The k-th kept row averaged over tables, for each k: what the published consensus expert attends to.

    Args:
        memories: Of tables of equal width that keep equally many rows.
    """
    log_weights = torch.stack([m.log_weights for m in memories]).logsumexp(0) - math.log(
        len(memories)
    )
    if memories[0].places is None:
        return Memory(torch.stack([m.rows for m in memories]).mean(0), None, log_weights)
    rows = torch.stack([m.gathered() for m in memories]).mean(0)  # [G, K, E]
    places = torch.arange(rows.shape[0] * rows.shape[1], device=rows.device).view(rows.shape[:2])
    return Memory(rows.flatten(0, 1), places, log_weights)


class Tap(NamedTuple):
    """Input and output of one linear map, per query block: enough for its gradient of every single sample."""

    parameter: str
    inputs: Tensor
    """[G, r, D_in]."""
    outputs: Tensor
    """[G, r, D_out], part of the graph."""


class ExpertCore(nn.Module):
    """Multi-head cross-attention from positions to kept tokens.

    In form core it has one shape whatever the table, and all start equal and live in one space, so that averaging their
    parameters means something. In form paper it reads the table's rows themselves.
    """

    def __init__(self, config: ExpertConfig, hidden_dim: int, memory_dim: int) -> None:
        super().__init__()
        inner = config.num_heads * config.head_dim
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.query = nn.Linear(hidden_dim, inner)
        self.key = nn.Linear(memory_dim, inner)
        self.value = nn.Linear(memory_dim, inner)
        self.out = nn.Linear(inner, hidden_dim)
        self.attention_dropout = nn.Dropout(config.dropout)
        self.output_dropout = nn.Dropout(config.dropout)
        self.apply(init_weights)
        self.taps: list[Tap] | None = None

    def forward(self, x: Tensor, memories: list[Memory]) -> Tensor:
        """Attend from every position to the kept tokens of all ``memories`` at once.

        Args:
            x: [G, n, D] positions, in blocks that share a query.
            memories: One for an expert; one per table for the consensus expert.

        Returns:
            [G, n, D].
        """
        groups, positions, _ = x.shape
        # Rows are projected once and then gathered: S products in place of G * K. One copy serves all queries that share it.
        shared = self.taps is None and all(m.places is None for m in memories)
        copies = 1 if shared else groups
        keys = torch.cat(
            [self._project("key", m, copies) for m in memories], dim=1
        )  # [G or 1, K, H*d]
        values = torch.cat([self._project("value", m, copies) for m in memories], dim=1)
        log_weights = torch.cat(
            [m.log_weights.expand(copies, -1) for m in memories], dim=1
        )  # [G or 1, K]
        query = self._tap("query", x, self.query(x))

        def split(t: Tensor) -> Tensor:
            return t.view(len(t), t.shape[1], self.num_heads, self.head_dim).transpose(
                1, 2
            )  # [G or 1, H, r, d]

        if shared:  # as one group, for a product would copy the memory once a group
            query = query.flatten(0, 1)[None]
        logits = split(query) @ split(keys).transpose(2, 3) / self.head_dim**0.5
        weights = torch.softmax(
            at_least_fp32(logits) + at_least_fp32(log_weights)[:, None, None, :], dim=-1
        ).to(x.dtype)
        mixed = self.attention_dropout(weights) @ split(values)  # [G, H, n, d]
        mixed = mixed.transpose(1, 2).reshape(groups, positions, self.num_heads * self.head_dim)
        return self.output_dropout(self._tap("out", mixed, self.out(mixed)))  # type: ignore[no-any-return]

    def _project(self, parameter: str, memory: Memory, copies: int) -> Tensor:
        """[G or 1, K, H*d] keys or values of what each query attends to."""
        linear: nn.Linear = getattr(self, parameter)
        if (
            memory.row_weights is not None
        ):  # they act before the bias, so each query has rows of its own
            rows = memory.gathered()
            return self._tap(parameter, rows, linear(rows))

        def gather(rows: Tensor) -> Tensor:
            return (
                rows.expand(copies, *rows.shape)
                if memory.places is None
                else F.embedding(memory.places, rows)
            )

        gathered = gather(linear(memory.rows))
        return (
            gathered if self.taps is None else self._tap(parameter, gather(memory.rows), gathered)
        )

    def _tap(self, parameter: str, inputs: Tensor, outputs: Tensor) -> Tensor:
        if self.taps is not None:
            self.taps.append(Tap(parameter, inputs.detach(), outputs))
        return outputs


class TableAdapter(nn.Module):
    """Maps a table's rows to the hidden space, normalised, so that every expert's memory has one scale."""

    def __init__(self, table_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(table_dim, hidden_dim)
        self.norm = nn.LayerNorm(hidden_dim)
        nn.init.normal_(self.linear.weight, std=table_dim**-0.5)
        nn.init.zeros_(self.linear.bias)

    def forward(self, rows: Tensor) -> Tensor:
        """[S, D_m] -> [S, D]."""
        return self.norm(self.linear(rows))  # type: ignore[no-any-return]


class Router(nn.Module):
    """Gate over the experts: dense or over the best few, optionally with the choice of no expert at all."""

    LOAD_DECAY = 0.9
    """Share of the old value in the moving average of the load."""

    load: Tensor
    """[E] moving average of each gate's weight over past steps."""

    def __init__(self, config: RouterConfig, hidden_dim: int, num_experts: int) -> None:
        super().__init__()
        self.config, self.num_experts = config, num_experts
        num_gates = num_experts + config.null_expert
        self.linear = nn.Linear(hidden_dim, num_gates)
        self.apply(init_weights)
        self.register_buffer("load", torch.full((num_gates,), 1 / num_gates))

    def forward(self, x: Tensor) -> Tensor:
        """[G, n, D] -> gate weights [G, n, E], summing to 1; E counts the null expert, which stands last."""
        logits = at_least_fp32(self.linear(x))
        if self.training and self.config.expert_dropout:
            logits = logits.masked_fill(self._dropped(logits), -torch.inf)
        if self.config.top_k is not None:
            last_kept = logits.topk(self.config.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < last_kept, -torch.inf)
        weights = torch.softmax(logits, dim=-1)
        if self.config.double_softmax:
            weights = torch.softmax(weights, dim=-1)
        return weights.to(x.dtype)

    def _dropped(self, logits: Tensor) -> Tensor:
        """[G, 1, E] experts left out of each query block; never the null expert, and never all."""
        dropped = torch.rand_like(logits[:, :1]) < self.config.expert_dropout
        dropped[..., self.num_experts :] = False
        return dropped & ~dropped.all(-1, keepdim=True)

    def balance_loss(self, gate_weights: Tensor) -> Tensor:
        """Sum over positions of E * <load, gate weights>: pushes weight off experts that have carried much of late.

        The load is that of *past* steps over all ranks, so the term is a plain sum over positions, equal for any
        division of the batch over ranks and micro-batches. Balanced experts give exactly 1 a position.

        Args:
            gate_weights: [N, E].
        """
        return (
            at_least_fp32(gate_weights) @ self.load.to(at_least_fp32(gate_weights))
        ).sum() * len(self.load)

    @torch.no_grad()
    def update_load(self, mean_gate_weights: Tensor) -> None:
        """Take in one step's mean gate weights [E] over the global batch."""
        self.load.lerp_(mean_gate_weights.to(self.load), 1 - self.LOAD_DECAY)
