"""Adam for a table of which an update touches few rows: what is exchanged and stepped are these
rows alone.

Row i belongs to rank i mod N (low ids are popular, so runs of rows would load rank 0), which alone
holds its moments. At an update each rank sends the gradients of the rows that it touched to their
owners; an owner sums and steps its rows and sends the new ones to every rank. So replicas of the
table stay equal to the bit, and nothing here grows with the table but the table and its moments.

Adam is lazy here, as in torch.optim.SparseAdam, whose numbers these are: moments of rows that are
not touched do not decay, and such rows do not move. AdamW steps every row at every update, so a
run's numbers are others.

Shapes: R x D the table, N ranks, U rows that an update touches: on this rank, or owned by it.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from mltfr_dist.config import OptimizerConfig
from mltfr_dist.data.batch import PADDING_IDX
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.distributed.table_shards import Exchange
from mltfr_dist.models.item_rows import ItemRows

EPSILON = 1e-8
"""As in torch's Adam."""


def lazy_adam(
    weight: Tensor,
    gradients: Tensor,
    moments: dict[str, Tensor],
    own: Tensor,
    betas: tuple[float, float],
    learning_rate: float,
    num_updates: int,
) -> Tensor:
    """One step of some rows.

    Args:
        weight: [U, D] the rows.
        gradients: [U, D] theirs.
        moments: "exp_avg" and "exp_avg_sq", of more rows; those of these rows are changed.
        own: [U] where these rows' moments are.
        betas: Adam's.
        learning_rate: Of this update.
        num_updates: This one included.

    Returns:
        [U, D] the new rows.
    """
    (beta1, beta2), n = betas, num_updates
    exp_avg = moments["exp_avg"][own].lerp_(gradients, 1 - beta1)
    exp_avg_sq = moments["exp_avg_sq"][own].lerp_(gradients.square(), 1 - beta2)
    size = learning_rate * math.sqrt(1 - beta2**n) / (1 - beta1**n)
    moments["exp_avg"].index_copy_(0, own, exp_avg)
    moments["exp_avg_sq"].index_copy_(0, own, exp_avg_sq)
    return weight - size * exp_avg / (exp_avg_sq.sqrt() + EPSILON)


class RowAdam:
    """Optimizer of an :class:`ItemRows`. Between two updates all ranks hold the same table."""

    ids: Tensor
    """[U] rows of the update."""
    gradients: Tensor
    """[U, D] their gradients."""

    def __init__(self, name: str, rows: ItemRows, config: OptimizerConfig, ranks: Ranks) -> None:
        """Args: name: the table's, among the model's tensors; rows: it; config: betas; ranks: all
        processes.
        """
        self.name, self.rows, self.betas, self.ranks = name, rows, config.betas, ranks
        self.exchange = Exchange(ranks)
        own = len(range(ranks.rank, rows.num_embeddings, ranks.world_size))
        self.moments = {
            key: rows.weight.new_zeros(own, rows.embedding_dim) for key in ("exp_avg", "exp_avg_sq")
        }
        self.num_updates = 0
        self.forget()
        dist.broadcast(rows.weight, 0)  # as DeepSpeed does with parameters

    def begin(self, num_updates: int = 0) -> None:
        """Moments of zero after ``num_updates`` updates."""
        self.num_updates = num_updates
        for moment in self.moments.values():
            moment.zero_()

    def forget(self) -> None:
        """Drop what was collected."""
        self.ids = torch.zeros(0, dtype=torch.int64, device=self.ranks.device)
        self.gradients = self.rows.weight.new_zeros(0, self.rows.embedding_dim)

    def collect(self) -> None:
        """Add the gradients of one backward pass to the update's."""
        taken = [(self.ids, self.gradients), *self.rows.take_gradients()]
        self._sum(
            torch.cat([ids for ids, _ in taken]),
            torch.cat([gradients.float() for _, gradients in taken]),
        )

    def _sum(self, ids: Tensor, gradients: Tensor) -> None:
        """Rows in ascending order, each once; padding is no item and never moves."""
        shape = self.rows.weight.shape
        summed = torch.sparse_coo_tensor(
            ids[None], gradients, shape, check_invariants=False
        ).coalesce()
        real = summed.indices()[0] != PADDING_IDX
        self.ids, self.gradients = summed.indices()[0][real], summed.values()[real]

    def reduce(self) -> None:
        """Bring the mean over ranks of each row's gradient to its owner. All ranks must call."""
        world_size = self.ranks.world_size
        owners = self.ids % world_size
        order = owners.argsort(stable=True)
        counts = owners.bincount(minlength=world_size)
        ones = [1] * world_size
        sent, received = counts.tolist(), self.exchange.deal(counts, ones, ones).tolist()
        ids = self.exchange.deal(self.ids[order], sent, received)
        self._sum(ids, self.exchange.deal(self.gradients[order] / world_size, sent, received))

    def squared_norm(self) -> Tensor:
        """Sum of squares of the update's gradient, over all rows, after :meth:`reduce`. All ranks
        must call.
        """
        return self.ranks.sum(self.gradients.square().sum())

    @torch.no_grad()
    def step(self, learning_rate: float, scale: float) -> None:
        """Step the rows that were touched, their gradients multiplied by ``scale``. All ranks must
        call.
        """
        self.num_updates += 1
        own = self.ids // self.ranks.world_size
        stepped = lazy_adam(
            self.rows.weight[self.ids],
            self.gradients * scale,
            self.moments,
            own,
            self.betas,
            learning_rate,
            self.num_updates,
        )
        counts = self.exchange.counts(len(own))
        self.rows.weight.index_copy_(
            0, self.exchange.gather(self.ids, counts), self.exchange.gather(stepped, counts)
        )
        self.forget()

    def whole(self, key: str) -> Tensor:
        """A moment of all rows [R, D] on rank 0, on the CPU; on the other ranks that of their own.
        All ranks must call.
        """
        own = self.moments[key]
        if self.ranks.world_size == 1:
            return own.cpu()
        if not self.ranks.is_main:
            dist.send(own, 0)
            return own.cpu()
        whole = torch.empty(self.rows.weight.shape)
        whole[:: self.ranks.world_size] = own.cpu()
        for rank in range(1, self.ranks.world_size):
            view = whole[rank :: self.ranks.world_size]
            received = own.new_empty(view.shape)
            dist.recv(received, rank)
            view.copy_(received)
        return whole

    def restore(self, key: str, ids: Tensor, values: Tensor) -> None:
        """Set a moment of this rank's rows among ``ids`` [n] from ``values`` [n, D]."""
        mine = ids % self.ranks.world_size == self.ranks.rank
        own = self.moments[key]
        own[ids[mine].to(own.device) // self.ranks.world_size] = values[mine].to(own.device)
