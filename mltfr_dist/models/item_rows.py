"""An item table of which training sees only the rows that a batch looks up.

The table is a buffer: neither autograd nor a divided optimizer ever makes a gradient of its size.
In training, what a lookup returns is a leaf of the graph instead, and after the backward pass holds
the gradients of its rows, which ``distributed/row_adam.py`` takes from there. It is saved under the
name of the embedding that it stands for, with the same content.

Shapes: R rows of the table (padding, items, special items), D hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ItemRows(nn.Module):
    """Takes the place of an ``nn.Embedding``: by call for some ids, as ``weight`` for all."""

    weight: Tensor
    """[R, D] fp32, whatever the model computes in: small steps add up in it."""
    dtype: torch.dtype
    """What the model computes in, and lookups give."""

    def __init__(self, embedding: nn.Embedding) -> None:
        """Args: embedding: [R, D], whose initialised rows become the table."""
        super().__init__()
        self.num_embeddings, self.embedding_dim = embedding.weight.shape
        self.register_buffer("weight", embedding.weight.detach())
        self.dtype = embedding.weight.dtype
        self._lookups: list[tuple[Tensor, Tensor]] = []

    def forward(self, item_ids: Tensor) -> Tensor:
        """Ids [...] -> vectors [..., D]."""
        vectors = F.embedding(item_ids, self.weight).to(self.dtype)
        if self.training and torch.is_grad_enabled():
            vectors.requires_grad_()
            self._lookups.append((item_ids, vectors))
        return vectors

    def take_gradients(self) -> list[tuple[Tensor, Tensor]]:
        """Ids [n] and gradients [n, D] of each lookup since the last call; what was not
        differentiated has none.
        """
        lookups, self._lookups = self._lookups, []
        return [(ids.flatten(), v.grad.flatten(0, -2)) for ids, v in lookups if v.grad is not None]
