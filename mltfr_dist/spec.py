"""The one constructor of models: runs, checkpoints, exports and tests all build theirs here.

Shapes: V_m x D_m token table m, C width of item features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext

from torch import Tensor, nn

from mltfr_dist.config import BackboneConfig, LossConfig, MLTFRConfig, PublishedConfig
from mltfr_dist.models.divided_rows import DividedRows, Division
from mltfr_dist.models.initial import ItemEmbedding, undrawn_items
from mltfr_dist.models.item_rows import ItemRows
from mltfr_dist.models.item_tokens import ItemVectors
from mltfr_dist.models.mltfr import MLTFR
from mltfr_dist.models.placed_table import PlacedTable
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.published.components import (
    published_backbone,
    published_components,
    published_table,
)
from mltfr_dist.schema import Section


class ModelSpec(Section):
    """All that a model is, but its tables' rows and its weights. An export stores it."""

    backbone: BackboneConfig
    mltfr: MLTFRConfig
    loss: LossConfig
    published: PublishedConfig
    num_items: int
    """Items are 1..num_items."""
    max_len: int
    """Longest history that is read."""
    tables: tuple[str, ...]
    """Names of the token tables, in the order of the experts."""
    has_consensus: bool
    """Whether the consensus expert of `mltfr.consensus.group` is there."""
    sparse_items: bool = False
    """Only item rows that a batch looks up get a gradient."""

    def build(
        self,
        tables: Mapping[str, Tensor | PlacedTable],
        item_features: Tensor | None = None,
        divide: Callable[[int], Division] | None = None,
    ) -> Recommender:
        """A freshly initialised model.

        Args:
            tables: Token tables by name: rows [V_m, D_m], or placed otherwise.
            item_features: [num_items + 1, C] what the tables give each item, where item tokens are
                on.
            divide: How so many rows of the item table are divided; None: they are not.
        """
        kind = published_backbone(self.backbone.name, self.published)
        with nullcontext() if divide is None else undrawn_items():
            backbone = kind(self.backbone, self.num_items, self.max_len)
        mltfr = self._mltfr([tables[name] for name in self.tables]) if self.mltfr.enabled else None
        division = None
        if divide is not None:
            assert isinstance(backbone.item_embedding, ItemEmbedding)
            division = divide(backbone.item_embedding.num_embeddings)
            backbone.item_embedding = DividedRows(backbone.item_embedding, division)
        elif self.sparse_items:
            assert isinstance(backbone.item_embedding, nn.Embedding)
            backbone.item_embedding = ItemRows(backbone.item_embedding)
        if item_features is not None:
            assert isinstance(backbone.item_embedding, nn.Embedding | ItemRows)
            backbone.item_embedding = ItemVectors(backbone.item_embedding, item_features)
        if mltfr is not None and (self.has_consensus or self.published.random_consensus):
            group = self.mltfr.consensus.group or self.tables
            mltfr.add_consensus(tables=[self.tables.index(name) for name in group])
        return Recommender(backbone, mltfr, self.loss, num_items=self.num_items, division=division)

    def _mltfr(self, tables: list[Tensor | PlacedTable]) -> MLTFR:
        hold = published_table(self.published)
        placed = [hold(t) if isinstance(t, Tensor) else t for t in tables]
        components = published_components(self.mltfr, self.published)
        return MLTFR(self.mltfr, self.backbone.hidden_dim, placed, components)
