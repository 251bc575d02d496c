"""Cross-attention experts over token tables, and the router that mixes them.

Shapes: G query blocks of n positions, K kept tokens, S candidate rows, H heads of size d, D hidden size, M experts.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mltfr_dist.config import ExpertConfig
from mltfr_dist.models.transformer import init_weights
from mltfr_dist.numerics import at_least_fp32


class Memory(NamedTuple):
    """What an expert attends to: candidate rows in the hidden space, and which of them each query keeps."""

    rows: Tensor
    """[S, D] adapted candidate rows."""
    places: Tensor | None
    """[G, K] kept places in ``rows``; None: every query attends to all rows."""
    log_weights: Tensor
    """[G, K] the filter's log-weights; [1, S] where all rows are attended to."""


class Tap(NamedTuple):
    """Input and output of one linear map, per query block: enough for its gradient of every single sample."""

    parameter: str
    inputs: Tensor
    """[G, r, D_in]."""
    outputs: Tensor
    """[G, r, D_out], part of the graph."""


class ExpertCore(nn.Module):
    """Multi-head cross-attention from positions to kept tokens, of one shape whatever the table.

    All experts' cores start equal and live in the same space, so that averaging their parameters means something.
    """

    def __init__(self, config: ExpertConfig, hidden_dim: int) -> None:
        super().__init__()
        inner = config.num_heads * config.head_dim
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.query = nn.Linear(hidden_dim, inner)
        self.key = nn.Linear(hidden_dim, inner)
        self.value = nn.Linear(hidden_dim, inner)
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
        keys = torch.cat([self._gather(self.key(m.rows), m, "key", copies) for m in memories], dim=1)  # [G or 1, K, H*d]
        values = torch.cat([self._gather(self.value(m.rows), m, "value", copies) for m in memories], dim=1)
        log_weights = torch.cat([m.log_weights.expand(copies, -1) for m in memories], dim=1)  # [G or 1, K]
        query = self._tap("query", x, self.query(x))

        def split(t: Tensor) -> Tensor:
            return t.view(len(t), t.shape[1], self.num_heads, self.head_dim).transpose(1, 2)  # [G or 1, H, r, d]

        if shared:  # as one group, for a product would copy the memory once a group
            query = query.flatten(0, 1)[None]
        logits = split(query) @ split(keys).transpose(2, 3) / self.head_dim**0.5
        weights = torch.softmax(at_least_fp32(logits) + at_least_fp32(log_weights)[:, None, None, :], dim=-1).to(x.dtype)
        mixed = self.attention_dropout(weights) @ split(values)  # [G, H, n, d]
        mixed = mixed.transpose(1, 2).reshape(groups, positions, self.num_heads * self.head_dim)
        return self.output_dropout(self._tap("out", mixed, self.out(mixed)))  # type: ignore[no-any-return]

    def _gather(self, projected: Tensor, memory: Memory, parameter: str, copies: int) -> Tensor:
        def gather(rows: Tensor) -> Tensor:
            return rows.expand(copies, *rows.shape) if memory.places is None else F.embedding(memory.places, rows)

        gathered = gather(projected)  # [G or 1, K, H*d]
        if self.taps is None:
            return gathered
        return self._tap(parameter, gather(memory.rows), gathered)

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
    """Dense gate over the experts, once through a softmax (the published variants apply it twice: docs/method.md, D10)."""

    LOAD_DECAY = 0.9
    """Share of the old value in the moving average of the load."""

    load: Tensor
    """[M] moving average of each expert's gate weight over past steps."""

    def __init__(self, hidden_dim: int, num_experts: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_dim, num_experts)
        self.apply(init_weights)
        self.register_buffer("load", torch.full((num_experts,), 1 / num_experts))

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> gate weights [..., M], each in (0, 1), summing to 1."""
        return torch.softmax(at_least_fp32(self.linear(x)), dim=-1).to(x.dtype)

    def balance_loss(self, gate_weights: Tensor) -> Tensor:
        """Sum over positions of M * <load, gate weights>: pushes weight off experts that have carried much of late.

        The load is that of *past* steps over all ranks, so the term is a plain sum over positions, equal for any
        division of the batch over ranks and micro-batches. Balanced experts give exactly 1 a position.

        Args:
            gate_weights: [N, M].
        """
        return (at_least_fp32(gate_weights) @ self.load.to(at_least_fp32(gate_weights))).sum() * len(self.load)

    @torch.no_grad()
    def update_load(self, mean_gate_weights: Tensor) -> None:
        """Take in one step's mean gate weights [M] over the global batch."""
        self.load.lerp_(mean_gate_weights.to(self.load), 1 - self.LOAD_DECAY)
