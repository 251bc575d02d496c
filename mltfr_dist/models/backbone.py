"""What every backbone offers, and the one point where MLTFR joins it.

Shapes: B users, L positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from mltfr_dist.data.batch import PADDING_IDX

Injection = Callable[[Tensor, Tensor], Tensor]
"""(input embeddings [B, L, D], valid mask [B, L]) -> what is added to the output of block 0 [B, L, D]."""


class Backbone(nn.Module):
    """A sequential recommender: item ids to one hidden state per position; scores are products with item vectors.

    A subclass sets ``item_embedding`` ([num_items + 1, D], row 0 padding) and ``blocks``, and implements ``embed``
    and ``finish``. It knows nothing of MLTFR.
    """

    item_embedding: nn.Embedding
    blocks: nn.ModuleList

    def embed(self, item_ids: Tensor) -> Tensor:
        """Item ids [B, L] -> input embeddings [B, L, D], zero at padding."""
        raise NotImplementedError

    def finish(self, hidden: Tensor) -> Tensor:
        """Output of the last block [B, L, D] -> hidden states that are scored against items [B, L, D]."""
        raise NotImplementedError

    def forward(self, item_ids: Tensor, injection: Injection | None = None) -> Tensor:
        """Item ids [B, L] -> hidden states [B, L, D], zero at padding."""
        valid_mask = item_ids != PADDING_IDX
        inputs = self.embed(item_ids)
        hidden = inputs
        for index, block in enumerate(self.blocks):
            hidden = block(hidden) * valid_mask[..., None]
            if index == 0 and injection is not None:
                hidden = hidden + injection(inputs, valid_mask)
        return self.finish(hidden) * valid_mask[..., None]
