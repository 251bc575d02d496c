"""The trained whole: a backbone, MLTFR on it, and the loss. One entry for training and ranking, so that ZeRO's hooks see both.

Shapes: B users, L positions, N real positions, D hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mltfr_dist.config import BackboneConfig, LossConfig, MLTFRConfig
from mltfr_dist.data.batch import PADDING_IDX, RankingBatch, SequenceBatch
from mltfr_dist.losses import binary_cross_entropy, full_cross_entropy
from mltfr_dist.models.backbone import Backbone
from mltfr_dist.models.mltfr import MLTFR, Explanation, RoutingStats
from mltfr_dist.models.packing import Packing
from mltfr_dist.models.sasrec import SASRec
from mltfr_dist.numerics import at_least_fp32

BACKBONES: dict[str, type[SASRec]] = {"sasrec": SASRec}


class TrainingOutput(NamedTuple):
    """Sums over the real positions of one micro-batch."""

    loss_sum: Tensor
    """Scalar."""
    routing: RoutingStats | None


class Recommender(nn.Module):
    """Backbone (+ MLTFR) with its loss."""

    def __init__(
        self,
        backbone: BackboneConfig,
        mltfr: MLTFRConfig,
        loss: LossConfig,
        *,
        num_items: int,
        max_len: int,
        table_rows: list[Tensor],
    ) -> None:
        super().__init__()
        self.loss_config = loss
        self.backbone: Backbone = BACKBONES[backbone.name](backbone, num_items, max_len)
        self.mltfr = MLTFR(mltfr, backbone.hidden_dim, table_rows) if mltfr.enabled else None

    def hidden(self, item_ids: Tensor) -> tuple[Tensor, Packing, RoutingStats | None]:
        """Item ids [B, L] -> hidden states of the real positions [N, D], where they stand, and routing sums."""
        if self.mltfr is None:
            return *self.backbone(item_ids), None
        stats: list[RoutingStats] = []
        mltfr = self.mltfr

        def injection(x: Tensor, valid_mask: Tensor) -> Tensor:
            added, routing = mltfr(x, valid_mask, item_ids)
            stats.append(routing)
            return added  # type: ignore[no-any-return]

        return *self.backbone(item_ids, injection), stats[0]

    def forward(self, batch: SequenceBatch | RankingBatch, weights: Tensor | None = None) -> TrainingOutput | Tensor:
        """Loss sums for a training batch, scores for a ranking batch.

        Args:
            batch: What to train on, or whose next item to rank.
            weights: [B, L] weight of each position in the loss; 1 where not given.

        Returns:
            :class:`TrainingOutput`; for a :class:`RankingBatch` scores [B, num_items + 1] (fp32 at least; column = item
            id, padding -inf).
        """
        hidden, packing, routing = self.hidden(batch.item_ids)
        if isinstance(batch, RankingBatch):
            return self._scores(packing.last(hidden))
        if weights is None:
            weights = torch.ones_like(batch.target_ids, dtype=torch.float32)
        return TrainingOutput(self._loss(hidden, batch, packing, packing.pack(weights)), routing)

    def _loss(self, hidden: Tensor, batch: SequenceBatch, packing: Packing, weights: Tensor) -> Tensor:
        targets = packing.pack(batch.target_ids)  # every real position of a training batch has one
        if self.loss_config.name == "cross_entropy":
            item_vectors = self.backbone.item_embedding.weight[1:]  # without padding
            return full_cross_entropy(hidden, item_vectors, targets, weights)
        assert batch.negative_ids is not None
        embedding = self.backbone.item_embedding
        return binary_cross_entropy(hidden, embedding(targets), embedding(packing.pack(batch.negative_ids)), weights)

    def _scores(self, final: Tensor) -> Tensor:
        scores = at_least_fp32(final @ self.backbone.item_embedding.weight.T)  # [B, I + 1]
        scores[:, PADDING_IDX] = -torch.inf
        return scores

    @torch.no_grad()
    def explain(self, item_ids: Tensor) -> list[Explanation]:
        """Kept tokens and gate weights at the last position of each history [B, L]."""
        assert self.mltfr is not None
        return self.mltfr.explain(self.backbone.inputs(item_ids), item_ids != PADDING_IDX, item_ids)
