"""The trained whole: a backbone, MLTFR on it, and the loss. One entry for training and ranking, so that ZeRO's hooks see both.

Shapes: B users, L positions, N real positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mltfr_dist.config import BackboneConfig, LossConfig, MLTFRConfig
from mltfr_dist.data.batch import PADDING_IDX, RankingBatch, SequenceBatch
from mltfr_dist.losses import (
    Negatives,
    binary_cross_entropy,
    contrastive,
    full_cross_entropy,
    generalised_binary_cross_entropy,
    sampled_softmax,
)
from mltfr_dist.models.backbone import backbone_class
from mltfr_dist.models.item_rows import ItemRows
from mltfr_dist.models.item_tokens import ItemVectors
from mltfr_dist.models.mltfr import MLTFR, Explanation
from mltfr_dist.models.packing import Packing
from mltfr_dist.models.routing_stats import RoutingStats
from mltfr_dist.models.table_rows import TableRows
from mltfr_dist.numerics import at_least_fp32


class TrainingOutput(NamedTuple):
    """Sums over one micro-batch."""

    loss_sum: Tensor
    """Scalar, over the scored positions."""
    routing: RoutingStats | None
    """Over the real positions."""
    contrastive_sum: Tensor | None = None
    """Scalar, over the sequences, where the backbone contrasts views."""


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
        table_rows: Sequence[Tensor | TableRows],
        item_features: Tensor | None = None,
        sparse_items: bool = False,
    ) -> None:
        """Args beside the configuration: sparse_items: only item rows that a batch looks up get a gradient."""
        super().__init__()
        self.loss_config = loss
        self.num_items = num_items
        self.backbone = backbone_class(backbone.name)(backbone, num_items, max_len)
        self.mltfr = MLTFR(mltfr, backbone.hidden_dim, table_rows) if mltfr.enabled else None
        if sparse_items:
            assert isinstance(self.backbone.item_embedding, nn.Embedding)
            self.backbone.item_embedding = ItemRows(self.backbone.item_embedding)
        if item_features is not None:
            assert isinstance(self.backbone.item_embedding, nn.Embedding | ItemRows)
            self.backbone.item_embedding = ItemVectors(self.backbone.item_embedding, item_features)

    def set_step(self, step: int) -> None:
        """Say how many updates of the run lie behind the weights; noise depends on it."""
        if self.mltfr is not None:
            self.mltfr.step = step

    @property
    def num_trained(self) -> int:
        """Numbers that are trained."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        return sum(
            t.numel()
            for t in [*parameters, *(m.weight for m in self.modules() if isinstance(m, ItemRows))]
        )

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

    def forward(
        self, batch: SequenceBatch | RankingBatch, weights: Tensor | None = None
    ) -> TrainingOutput | Tensor:
        """Loss sums for a training batch, scores for a ranking batch.

        Args:
            batch: What to train on, or whose next item to rank.
            weights: [B, L] weight of each position in the loss; 1 where not given.

        Returns:
            :class:`TrainingOutput`; for a :class:`RankingBatch` scores [B, num_items + 1] (fp32 at least; column = item
            id, padding -inf).
        """
        if isinstance(batch, RankingBatch):
            hidden, packing, _ = self.hidden(
                self.widened(self.backbone.for_ranking(batch.item_ids))
            )
            return self._scores(self.backbone.last(hidden, packing))
        if weights is None:
            weights = torch.ones_like(batch.target_ids, dtype=torch.float32)
        if self.backbone.attended_width is not None:
            batch, weights = self._widened_batch(batch), self.widened(weights)
        hidden, packing, routing = self.hidden(batch.item_ids)
        loss_sum = self._loss(hidden, batch, packing, packing.pack(weights))
        return TrainingOutput(
            loss_sum, routing, self._contrast(batch) if batch.view_ids is not None else None
        )

    def widened(self, t: Tensor) -> Tensor:
        """[B, L, ...] -> [B, W, ...] where padding acts as items, with W their width; as it is elsewhere."""
        missing = max(0, (self.backbone.attended_width or 0) - t.shape[1])
        return F.pad(t, (0, 0) * (t.ndim - 2) + (0, missing))

    def _widened_batch(self, batch: SequenceBatch) -> SequenceBatch:
        negatives = None if batch.negative_ids is None else self.widened(batch.negative_ids)
        ids, targets = self.widened(batch.item_ids), self.widened(batch.target_ids)
        return batch._replace(item_ids=ids, target_ids=targets, negative_ids=negatives)

    def _loss(
        self, hidden: Tensor, batch: SequenceBatch, packing: Packing, weights: Tensor
    ) -> Tensor:
        """Weighted loss over the scored positions: those of the real positions [N] that have a target."""
        targets = packing.pack(batch.target_ids)
        scored = (targets != PADDING_IDX).nonzero()[:, 0]
        hidden, targets, weights = (t.index_select(0, scored) for t in (hidden, targets, weights))
        embedding = self.backbone.item_embedding
        if self.loss_config.name == "cross_entropy":
            item_vectors = embedding.weight[1 : self.num_items + 1]  # [I, D], no padding, no mask
            return full_cross_entropy(hidden, item_vectors, targets, weights)
        if self.loss_config.name == "sampled_softmax":
            assert batch.shared_negative_ids is not None
            assert batch.shared_log_probability is not None
            ids = batch.shared_negative_ids
            negatives = Negatives(ids, embedding(ids), batch.shared_log_probability)
            return sampled_softmax(hidden, targets, embedding(targets), negatives, weights)
        assert batch.negative_ids is not None
        negative_vectors = embedding(packing.pack(batch.negative_ids).index_select(0, scored))
        if self.loss_config.name == "bce":
            return binary_cross_entropy(hidden, embedding(targets), negative_vectors, weights)
        calibration = self.loss_config.calibration
        return generalised_binary_cross_entropy(
            hidden,
            embedding(targets),
            negative_vectors,
            weights,
            num_items=self.num_items,
            calibration=calibration,
        )

    def _contrast(self, batch: SequenceBatch) -> Tensor:
        """The contrastive term over the two views of each history, each read at its last position."""
        assert batch.view_ids is not None
        hidden, packing, _ = self.hidden(batch.view_ids.flatten(0, 1))  # one pass: [2 B, L]
        first, second = packing.last(hidden).view(len(batch.view_ids), 2, -1).unbind(1)
        return contrastive(
            first,
            second,
            batch.sample_ids >= 0,
            group_size=self.loss_config.contrast_group,
            temperature=self.loss_config.contrast_temperature,
        )

    def _scores(self, final: Tensor) -> Tensor:
        item_vectors = self.backbone.item_embedding.weight[: self.num_items + 1].to(final.dtype)
        scores = at_least_fp32(final @ item_vectors.T)  # [B, I + 1]
        scores[:, PADDING_IDX] = -torch.inf
        return scores

    @torch.no_grad()
    def explain(self, item_ids: Tensor) -> list[Explanation]:
        """Kept tokens and gate weights at the last position of each history [B, L]."""
        assert self.mltfr is not None
        read = self.widened(self.backbone.for_ranking(item_ids))
        return self.mltfr.explain(
            self.backbone.inputs(read), self.backbone.pack(read).valid_mask, read
        )


def assemble(
    backbone: BackboneConfig,
    mltfr: MLTFRConfig,
    loss: LossConfig,
    *,
    num_items: int,
    max_len: int,
    tables: Mapping[str, Tensor | TableRows],
    item_features: Tensor | None,
    sparse_items: bool,
    with_consensus: bool,
) -> Recommender:
    """The model of a configuration, whoever asks for it: a run, or an export of one.

    Args:
        backbone: Its configuration.
        mltfr: That of MLTFR.
        loss: That of the loss.
        num_items: Items are 1..num_items.
        max_len: Longest history that is read.
        tables: Token tables by name, in the order of the experts: rows [V_m, D_m], or placed
            otherwise.
        item_features: [num_items + 1, C] what the tables give each item, where item tokens are on.
        sparse_items: Only item rows that a batch looks up get a gradient.
        with_consensus: Whether the consensus expert of `mltfr.consensus.group` is there.
    """
    model = Recommender(
        backbone,
        mltfr,
        loss,
        num_items=num_items,
        max_len=max_len,
        table_rows=list(tables.values()),
        item_features=item_features,
        sparse_items=sparse_items,
    )
    if with_consensus:
        assert model.mltfr is not None
        names = list(tables)
        model.mltfr.add_consensus(
            tables=[names.index(name) for name in mltfr.consensus.group or names]
        )
    return model
