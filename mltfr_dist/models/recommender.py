"""The trained whole: a backbone, MLTFR on it, and the loss. One entry for training and ranking, so that ZeRO's hooks see both.

Shapes: B users, L positions, N real positions, D hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mltfr_dist.config import BackboneConfig, LossConfig, MLTFRConfig
from mltfr_dist.data.batch import PADDING_IDX, RankingBatch, SequenceBatch, lengths
from mltfr_dist.losses import binary_cross_entropy, full_cross_entropy
from mltfr_dist.models.backbone import Backbone
from mltfr_dist.models.mltfr import MLTFR, Explanation, RoutingStats
from mltfr_dist.models.sasrec import SASRec

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

    def hidden(self, item_ids: Tensor) -> tuple[Tensor, RoutingStats | None]:
        """Item ids [B, L] -> hidden states [B, L, D] and routing sums."""
        if self.mltfr is None:
            return self.backbone(item_ids), None
        stats: list[RoutingStats] = []
        mltfr = self.mltfr

        def injection(x: Tensor, valid_mask: Tensor) -> Tensor:
            added, routing = mltfr(x, valid_mask)
            stats.append(routing)
            return added  # type: ignore[no-any-return]

        return self.backbone(item_ids, injection), stats[0]

    def forward(self, batch: SequenceBatch | RankingBatch, weights: Tensor | None = None) -> TrainingOutput | Tensor:
        """Loss sums for a training batch, scores for a ranking batch.

        Args:
            batch: What to train on, or whose next item to rank.
            weights: [B, L] weight of each position in the loss; 1 where not given.

        Returns:
            :class:`TrainingOutput`; for a :class:`RankingBatch` scores [B, num_items + 1] (fp32; column = item id,
            padding -inf).
        """
        hidden, routing = self.hidden(batch.item_ids)
        if isinstance(batch, RankingBatch):
            return self._scores(hidden, batch.item_ids)
        scored = batch.target_ids != PADDING_IDX
        position_weights = torch.ones_like(scored, dtype=torch.float32) if weights is None else weights
        return TrainingOutput(self._loss(hidden[scored], batch, scored, position_weights[scored]), routing)

    def _loss(self, hidden: Tensor, batch: SequenceBatch, scored: Tensor, weights: Tensor) -> Tensor:
        targets = batch.target_ids[scored]
        if self.loss_config.name == "cross_entropy":
            item_vectors = self.backbone.item_embedding.weight[1:]  # without padding
            return full_cross_entropy(hidden, item_vectors, targets, weights)
        assert batch.negative_ids is not None
        embedding = self.backbone.item_embedding
        return binary_cross_entropy(hidden, embedding(targets), embedding(batch.negative_ids[scored]), weights)

    def _scores(self, hidden: Tensor, item_ids: Tensor) -> Tensor:
        last = (lengths(item_ids) - 1).clamp(min=0)
        final = hidden[torch.arange(len(hidden), device=hidden.device), last]  # [B, D]
        scores = (final @ self.backbone.item_embedding.weight.T).float()  # [B, I + 1]
        scores[:, PADDING_IDX] = -torch.inf
        return scores

    @torch.no_grad()
    def explain(self, item_ids: Tensor) -> list[Explanation]:
        """Kept tokens and gate weights at the last position of each history [B, L]."""
        assert self.mltfr is not None
        return self.mltfr.explain(self.backbone.embed(item_ids), item_ids != PADDING_IDX)
