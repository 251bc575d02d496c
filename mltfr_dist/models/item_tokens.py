"""Item-side tokens: an item's vector is its own embedding plus an adapted mixture of rows of the
token tables.

It takes the place of a backbone's ``item_embedding``, so input and output share it and no backbone
knows of it.

Shapes: I items, R rows of the embedding (padding, items, special items), D hidden size, C columns
of all tables together.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mltfr_dist.models.divided_rows import DividedRows
from mltfr_dist.models.item_rows import ItemRows
from mltfr_dist.models.transformer import init_weights


class ItemVectors(nn.Module):
    """e_i + A f_i, offered as an embedding is: by call for some ids, as ``weight`` for all.

    The mixtures f_i are a buffer outside the state: never trained, never saved. An item without
    tokens, padding and special items have f_i = 0 and keep their own embedding.
    """

    features: Tensor
    """[R, C]."""

    def __init__(self, embedding: nn.Embedding | ItemRows, item_features: Tensor) -> None:
        """Args: embedding: the backbone's own, [R, D]; item_features: [I + 1, C], row 0 zero."""
        super().__init__()
        self.embedding = embedding
        special = embedding.num_embeddings - len(item_features)
        self.register_buffer("features", F.pad(item_features, (0, 0, 0, special)), persistent=False)
        self.adapter = nn.Linear(item_features.shape[1], embedding.embedding_dim, bias=False)
        self.adapter.apply(init_weights)

    def forward(self, item_ids: Tensor) -> Tensor:
        """Ids [...] -> vectors [..., D]; each distinct item is adapted once."""
        own = self.embedding(item_ids)
        distinct, indices = torch.unique(item_ids, return_inverse=True)
        adapted = self.adapter(self.features[distinct].to(own.dtype))
        return own + F.embedding(indices, adapted)  # type: ignore[no-any-return]

    def own_vectors(self) -> Tensor:
        """Vectors of this process's rows [O, D] of a table that is divided."""
        assert isinstance(self.embedding, DividedRows)
        own = self.embedding.own_vectors()
        features = self.features[self.embedding.division.own_ids]
        return own + self.adapter(features.to(own.dtype))  # type: ignore[no-any-return]

    @property
    def weight(self) -> Tensor:
        """Vectors of all rows [R, D], to be read inside the model's forward pass (divided
        parameters are gathered there).
        """
        adapted: Tensor = self.adapter(self.features.to(self.adapter.weight.dtype))
        return self.embedding.weight.to(adapted.dtype) + adapted
