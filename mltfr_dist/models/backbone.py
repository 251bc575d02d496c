"""What every backbone offers, and the one point where MLTFR joins it.

Shapes: B users, L positions, N real positions (no padding), D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from mltfr_dist.models.packing import Packing

Injection = Callable[[Tensor, Tensor], Tensor]
"""(input embeddings [B, L, D], valid mask [B, L]) -> what is added to the output of block 0 [B, L, D]."""


class Backbone(nn.Module):
    """A sequential recommender: item ids to one hidden state per position; scores are products with item vectors.

    A subclass sets ``item_embedding`` ([num_items + 1, D], row 0 padding) and ``blocks`` (modules that map real positions
    [N, D] and their :class:`Packing` to [N, D]), and implements ``embed`` and ``finish``. It knows nothing of MLTFR.
    """

    item_embedding: nn.Embedding
    blocks: nn.ModuleList

    def embed(self, item_ids: Tensor, positions: Tensor) -> Tensor:
        """Item ids [N] and their places in the history [N] -> input embeddings [N, D]."""
        raise NotImplementedError

    def finish(self, hidden: Tensor) -> Tensor:
        """Output of the last block [N, D] -> hidden states that are scored against items [N, D]."""
        raise NotImplementedError

    def inputs(self, item_ids: Tensor) -> Tensor:
        """Item ids [B, L] -> input embeddings [B, L, D], zero at padding: what an injection reads."""
        packing = Packing(item_ids)
        return packing.unpack(self.embed(packing.pack(item_ids), packing.columns))

    def forward(self, item_ids: Tensor, injection: Injection | None = None) -> tuple[Tensor, Packing]:
        """Item ids [B, L] -> hidden states of the real positions [N, D], and where they stand."""
        packing = Packing(item_ids)
        inputs = self.embed(packing.pack(item_ids), packing.columns)
        hidden = inputs
        for index, block in enumerate(self.blocks):
            hidden = block(hidden, packing)
            if index == 0 and injection is not None:
                hidden = hidden + packing.pack(injection(packing.unpack(inputs), packing.valid_mask))
        return self.finish(hidden), packing
