"""Cross-attention experts over token tables.

Shapes: G query blocks of n positions, K kept tokens, S candidate rows, H heads of size d, D hidden
size, E experts (or the width of its rows).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mltfr_dist.config import ExpertConfig
from mltfr_dist.models.dropout import Dropout, masks
from mltfr_dist.models.kernels import Blocks, attend, masked_by, usable
from mltfr_dist.models.transformer import init_weights
from mltfr_dist.numerics import at_least_fp32


class ExpertRows(NamedTuple):
    """What an expert attends to: candidate rows in its space of E dimensions, and which of them
    each query keeps.
    """

    rows: Tensor
    """[S, E] adapted candidate rows (E = D where experts have adapters)."""
    kept: Tensor | None
    """[G, K] indices of the kept ``rows``; None: every query attends to all."""
    log_weights: Tensor
    """[G, K] the selector's log-weights; [1, S] where all rows are attended to."""


class Tap(NamedTuple):
    """Input and output of one linear map, per query block: enough for its gradient of every single
    sample.
    """

    parameter: str
    inputs: Tensor
    """[G, r, D_in]."""
    outputs: Tensor
    """[G, r, D_out], part of the graph."""


class Output(NamedTuple):
    """What an expert says, and what it is still to be multiplied with."""

    values: Tensor
    """[G, n, D], or [N, D] of positions without padding."""
    mask: Tensor | None
    """[G, n, D], of whole blocks in either case; None: nothing."""


class ExpertCore(nn.Module):
    """Multi-head cross-attention from positions to kept tokens.

    It has one shape whatever the table, and all start equal and live in one space, so that
    averaging their parameters means something.
    """

    def __init__(self, config: ExpertConfig, hidden_dim: int, row_dim: int) -> None:
        super().__init__()
        inner = config.num_heads * config.head_dim
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.query = nn.Linear(hidden_dim, inner)
        self.key = nn.Linear(row_dim, inner)
        self.value = nn.Linear(row_dim, inner)
        self.out = nn.Linear(inner, hidden_dim)
        self.attention_dropout = Dropout(config.dropout)
        self.output_dropout = Dropout(config.dropout)
        self.apply(init_weights)
        self._taps: list[Tap] | None = None

    @property
    def is_tapped(self) -> bool:
        """Whether inputs and outputs of its linear maps are kept now."""
        return self._taps is not None

    @contextmanager
    def tapped(self) -> Iterator[list[Tap]]:
        """Inputs and outputs of its linear maps in the forward passes meanwhile."""
        taps = self._taps = []
        try:
            yield taps
        finally:
            self._taps = None

    def forward(
        self, x: Tensor, attended: list[ExpertRows], blocks: Blocks | None = None
    ) -> Tensor:
        """Positions attend to the kept tokens of all ``attended`` at once (one for an expert, one
        per table for the consensus expert).

        Args:
            x: [G, n, D], in blocks that share a query; or [N, D].
            attended: What they attend to.
            blocks: How [N, D] is in blocks; where :meth:`reads_in_place` says yes.

        Returns:
            As ``x``.
        """
        output = self.output(x, attended, blocks)
        return masked_by(*output, None if blocks is None else blocks.places)

    def output(self, x: Tensor, attended: list[ExpertRows], blocks: Blocks | None = None) -> Output:
        """:meth:`forward`; where there are kernels, its dropout is left to who mixes."""
        query = self._tap("query", x, self.query(x))
        num_blocks = x.shape[0] if blocks is None else blocks.ends.shape[0]
        in_place = self.reads_in_place(query, attended, num_blocks)
        if in_place:
            on_weights, mask = self._masks(query, attended, blocks)
            mixed = self._attended_in_place(query, attended, blocks, on_weights)
        else:
            mixed = self._attended(query, attended)
        values = self._tap("out", mixed, self.out(mixed))
        # No call of the dropout's module, for with kernels there is none: a process may have
        # them, another not.
        if usable(values) is None:
            return Output(self.output_dropout.forward(values), None)
        if not in_place:
            (mask,) = masks([self.output_dropout], [values.shape])
        return Output(values, mask)

    def _masks(
        self, query: Tensor, attended: list[ExpertRows], blocks: Blocks | None
    ) -> list[Tensor | None]:
        """What kernels multiply attention's weights [G, H, n, K] and the output with; drawn for
        whole blocks, so that what is drawn does not depend on how positions stand.
        """
        size = query.shape[1] if blocks is None else blocks.block_len
        groups, count = len(attended[0].log_weights), sum(m.log_weights.shape[1] for m in attended)
        of_weights = (groups, self.num_heads, size, count)
        dropouts = [self.attention_dropout, self.output_dropout]
        return masks(dropouts, [of_weights, (groups, size, self.out.out_features)])

    def reads_in_place(self, x: Tensor, attended: list[ExpertRows], num_blocks: int) -> bool:
        """Whether kept rows are read where they stand, without a copy: where there is a kernel, and
        no copies are asked for.

        The batch has no say in it, for every process must call the linear maps equally often: a
        call may gather their parameters from all.
        """
        if self._taps is not None or usable(x) is None:
            return False
        return all(m.kept is not None and len(m.log_weights) == num_blocks for m in attended)

    def _attended_in_place(
        self,
        query: Tensor,
        attended: list[ExpertRows],
        blocks: Blocks | None,
        mask: Tensor | None,
    ) -> Tensor:
        """What queries read, of their shape [..., H*d]; ``mask`` [G, H, n, K] of the weights."""
        keys = _joined([self.key(m.rows) for m in attended])  # [S of all, H*d]
        values = _joined([self.value(m.rows) for m in attended])
        starts = accumulate((len(m.rows) for m in attended), initial=0)
        pairs = zip(attended, starts)
        kept = _joined(
            [m.kept + start if start else m.kept for m, start in pairs if m.kept is not None], dim=1
        )
        log_weights = _joined([m.log_weights for m in attended], dim=1)
        return attend(query, keys, values, kept, log_weights, mask, self.num_heads, blocks)

    def _attended(self, query: Tensor, attended: list[ExpertRows]) -> Tensor:
        """[G, n, H*d] what queries of that shape read of rows copied for each of them."""
        groups, positions, width = query.shape
        # Rows are projected once and then gathered: S products in place of G * K. One copy serves
        # all queries that share it.
        shared = self._taps is None and all(m.kept is None for m in attended)
        copies = 1 if shared else groups
        keys = torch.cat(
            [self._project("key", m, copies) for m in attended], dim=1
        )  # [G or 1, K, H*d]
        values = torch.cat([self._project("value", m, copies) for m in attended], dim=1)
        log_weights = torch.cat(
            [m.log_weights.expand(copies, -1) for m in attended], dim=1
        )  # [G or 1, K]

        def split(t: Tensor) -> Tensor:
            return t.view(t.shape[0], t.shape[1], self.num_heads, self.head_dim).transpose(
                1, 2
            )  # [G or 1, H, r, d]

        if shared:  # as one group, for a product would copy the rows once a group
            query = query.flatten(0, 1)[None]
        logits = split(query) @ split(keys).transpose(2, 3) / self.head_dim**0.5
        weights = torch.softmax(
            at_least_fp32(logits) + at_least_fp32(log_weights)[:, None, None, :], dim=-1
        ).to(query.dtype)
        # No call of the module, as in `output`.
        mixed: Tensor = self.attention_dropout.forward(weights) @ split(values)  # [G, H, n, d]
        return mixed.transpose(1, 2).reshape(groups, positions, width)

    def _project(self, parameter: str, attended: ExpertRows, copies: int) -> Tensor:
        """[G or 1, K, H*d] keys or values of what each query attends to."""
        linear: nn.Linear = getattr(self, parameter)

        def gather(rows: Tensor) -> Tensor:
            if attended.kept is None:
                return rows.expand(copies, *rows.shape)
            return F.embedding(attended.kept, rows)

        gathered = gather(linear(attended.rows))
        if self._taps is None:
            return gathered
        return self._tap(parameter, gather(attended.rows), gathered)

    def _tap(self, parameter: str, inputs: Tensor, outputs: Tensor) -> Tensor:
        if self._taps is not None:
            self._taps.append(Tap(parameter, inputs.detach(), outputs))
        return outputs


def _joined(parts: list[Tensor], dim: int = 0) -> Tensor:
    """``torch.cat``, which copies a single part as well."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


class TableAdapter(nn.Module):
    """Maps a table's rows to the hidden space, normalised, so that rows of every expert have one
    scale.
    """

    def __init__(self, table_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(table_dim, hidden_dim)
        self.norm = nn.LayerNorm(hidden_dim)
        nn.init.normal_(self.linear.weight, std=table_dim**-0.5)
        nn.init.zeros_(self.linear.bias)

    def forward(self, rows: Tensor) -> Tensor:
        """[S, D_m] -> [S, D]."""
        return self.norm(self.linear(rows))  # type: ignore[no-any-return]


class Experts(NamedTuple):
    """The experts of all tables, in the tables' order."""

    adapters: nn.ModuleList
    """One an expert: rows [S, D_m] to its space [S, E]."""
    cores: nn.ModuleList


def shared_experts(config: ExpertConfig, hidden_dim: int, table_dims: Sequence[int]) -> Experts:
    """Adapters of their own and cores that start equal, one an entry of ``table_dims`` (D_m of its
    table).
    """
    adapters = nn.ModuleList(TableAdapter(width, hidden_dim) for width in table_dims)
    core = ExpertCore(config, hidden_dim, hidden_dim)
    return Experts(adapters, nn.ModuleList(copy.deepcopy(core) for _ in table_dims))
