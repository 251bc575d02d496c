"""Steps an item table that is divided by rows: each rank its own, with the gradients that all ranks
send it.

With `optimizer.item_gradients=sparse` by lazy Adam (`row_adam.py`), rows that the update touches
alone; with `dense` by the run's own optimizer, all rows. Both are told the norm of all gradients
and skip what DeepSpeed skips, as `row_adam.py` does.

Shapes: O rows of this rank, D hidden size, U rows that an update touches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mltfr_dist.config import OptimizerConfig
from mltfr_dist.distributed.item_division import RankDivision
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.distributed.row_adam import RowAdam, lazy_adam
from mltfr_dist.models.divided_rows import DividedRows
from mltfr_dist.models.item_rows import ItemRows
from mltfr_dist.optim import build_rows_optimizer
from mltfr_dist.optimizers import OPTIMIZERS


class DividedOptimizer:
    """What both have in common: gradients are collected, sent home, averaged over ranks."""

    moments: dict[str, Tensor]
    """By name: [O, D] what is kept of each row of this rank."""
    positions: Tensor
    """[U] where an update's rows stand: in the whole order before :meth:`reduce`, among this rank's
    after it.
    """
    gradients: Tensor
    """[U, D] their gradients."""
    own: Tensor | None
    """[O, D] gradients of this rank's rows that other ranks need not send, of a loss over all
    items.
    """

    def __init__(self, name: str, rows: DividedRows) -> None:
        """Args: name: the table's, among the model's tensors; rows: it."""
        assert isinstance(rows.division, RankDivision)
        self.name, self.rows, self.division = name, rows, rows.division
        self.num_updates = 0
        self.forget()

    def begin(self, num_updates: int = 0) -> None:
        """Moments of zero after ``num_updates`` updates."""
        self.num_updates = num_updates
        for moment in self.moments.values():
            moment.zero_()

    def forget(self) -> None:
        """Drop what was collected."""
        weight = self.rows.weight
        self.positions = torch.zeros(0, dtype=torch.int64, device=weight.device)
        self.gradients, self.own = weight.new_zeros(0, weight.shape[1]), None

    def collect(self) -> None:
        """Add the gradients of one backward pass to the update's."""
        taken = [(self.positions, self.gradients), *self.rows.take_gradients()]
        self._sum([positions for positions, _ in taken], [gradient for _, gradient in taken])
        for gradient in self.rows.take_own_gradients():
            self.own = gradient.float() if self.own is None else self.own.add_(gradient)

    def _sum(self, positions: list[Tensor], gradients: list[Tensor]) -> None:
        """Rows in ascending order, each once; padding, at position 0 of all, is no item and never
        moves.
        """
        self.positions, inverse = torch.unique(torch.cat(positions), return_inverse=True)
        rows = torch.cat([gradient.float() for gradient in gradients])
        self.gradients = rows.new_zeros(len(self.positions), rows.shape[1])
        self.gradients.index_add_(0, inverse, rows)

    def reduce(self) -> None:
        """Bring the mean over ranks of each row's gradient to its owner. All ranks must call."""
        exchange, world_size = self.division.exchange, self.division.ranks.world_size
        if len(self.positions) and self.positions[0] == 0:
            self.positions, self.gradients = self.positions[1:], self.gradients[1:]
        sent = self.division.shares(self.positions)
        received = self.division.exchange_counts(sent)
        positions = exchange.deal(self.positions, sent, received)
        gradients = exchange.deal(self.gradients / world_size, sent, received)
        self._sum([positions - self.division.first], [gradients])
        if self.own is not None:
            self.own.div_(world_size).index_add_(0, self.positions, self.gradients)

    def squared_norm(self) -> Tensor:
        """Sum of squares of the update's gradient, over all rows, after :meth:`reduce`. All ranks
        must call.
        """
        gradients = self.gradients if self.own is None else self.own
        return self.division.ranks.sum(gradients.square().sum())

    def step(self, learning_rate: float, scale: float) -> None:
        """Step this rank's rows, their gradients multiplied by ``scale``."""
        raise NotImplementedError


class LazyDivided(DividedOptimizer):
    """Lazy Adam of the rows that an update touches."""

    def __init__(self, name: str, rows: DividedRows, config: OptimizerConfig) -> None:
        """Args: name: the table's; rows: it; config: betas."""
        super().__init__(name, rows)
        self.betas = config.betas
        self.moments = {key: torch.zeros_like(rows.weight) for key in ("exp_avg", "exp_avg_sq")}

    @torch.no_grad()
    def step(self, learning_rate: float, scale: float) -> None:
        """Step the rows that were touched."""
        self.num_updates += 1
        weight, gradients = self.rows.weight, self.gradients * scale
        stepped = lazy_adam(
            weight[self.positions],
            gradients,
            self.moments,
            self.positions,
            self.betas,
            learning_rate,
            self.num_updates,
        )
        weight.index_copy_(0, self.positions, stepped)
        self.forget()


class DenseDivided(DividedOptimizer):
    """The run's optimizer over all rows: it looks at one number at a time, so a share of them is
    stepped as the whole.
    """

    def __init__(
        self, name: str, rows: DividedRows, config: OptimizerConfig, *, fused: bool
    ) -> None:
        """Args: name: the table's; rows: it; config: the optimizer; fused: whether one kernel may
        step it.
        """
        super().__init__(name, rows)
        self.parameter = nn.Parameter(rows.weight)
        self.keys = OPTIMIZERS[config.name].state
        self.optimizer: Optimizer = build_rows_optimizer(self.parameter, config, fused=fused)
        self.begin()

    def begin(self, num_updates: int = 0) -> None:
        """What the optimizer keeps: zeros after ``num_updates`` updates."""
        self.num_updates = num_updates
        self.moments = {key: torch.zeros_like(self.rows.weight) for key in self.keys}
        on_device = self.optimizer.defaults.get("fused") or self.optimizer.defaults.get(
            "capturable"
        )
        device = self.rows.weight.device if on_device else torch.device("cpu")
        step = torch.tensor(float(num_updates), device=device)
        self.optimizer.state[self.parameter] = {**self.moments, "step": step}

    @torch.no_grad()
    def step(self, learning_rate: float, scale: float) -> None:
        """Step all of this rank's rows."""
        self.num_updates += 1
        if self.own is None:
            zeros = torch.zeros_like(self.rows.weight)
            self.own = zeros.index_add_(0, self.positions, self.gradients)
        self.parameter.grad = self.own.mul_(scale)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.parameter.grad = None
        self.forget()


def row_optimizer(
    name: str, rows: ItemRows, config: OptimizerConfig, ranks: Ranks, *, fused: bool
) -> RowAdam | DividedOptimizer:
    """What steps an item table that is no parameter."""
    if not isinstance(rows, DividedRows):
        return RowAdam(name, rows, config, ranks)
    if config.item_gradients == "sparse":
        return LazyDivided(name, rows, config)
    return DenseDivided(name, rows, config, fused=fused)
