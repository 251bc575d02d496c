"""What every backbone offers; :meth:`Recommender.hidden` runs it.

Shapes: B users, L positions, N real positions (no padding), D hidden size.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor, nn

from mltfr_dist.backbones import BACKBONES
from mltfr_dist.config import BackboneConfig
from mltfr_dist.models.dropout import Dropout
from mltfr_dist.models.initial import ItemEmbedding
from mltfr_dist.models.item_rows import ItemRows
from mltfr_dist.models.item_tokens import ItemVectors
from mltfr_dist.models.packing import Lengths, Packing
from mltfr_dist.models.transformer import init_weights
from mltfr_dist.registry import load


class Backbone(nn.Module):
    """A sequential recommender: item ids to one hidden state per position; scores are products with
    item vectors.

    A subclass sets ``item_embedding`` ([num_items + 1 or more, D]: row 0 padding, rows above
    num_items are no items) and ``blocks`` (modules that map real positions [N, D] and their
    :class:`Packing` to [N, D]), and implements ``embed`` and ``finish``. It knows nothing of MLTFR.
    """

    objective: ClassVar[Literal["next_item", "cloze"]] = "next_item"
    """next_item: causal, each position predicts what follows; cloze: bidirectional, masked
    positions predict themselves.
    """

    contrasts_views: ClassVar[bool] = False
    """Whether the loss also contrasts augmented views of each history: see :meth:`contrast`."""

    item_embedding: nn.Embedding | ItemRows | ItemVectors
    blocks: nn.ModuleList

    def __init__(self, config: BackboneConfig, num_items: int, max_len: int) -> None:
        """Args: config: sizes; num_items: items are 1..num_items; max_len: longest history."""
        super().__init__()

    def embed(self, item_ids: Tensor, positions: Tensor) -> Tensor:
        """Item ids [N] and their positions in the history [N] -> input embeddings [N, D]."""
        raise NotImplementedError

    def finish(self, hidden: Tensor) -> Tensor:
        """Output of the last block [N, D] -> hidden states that are scored against items [N, D]."""
        raise NotImplementedError

    def last(self, hidden: Tensor, packing: Packing) -> Tensor:
        """Hidden states [N, D] -> those that rank the next item [B, D]."""
        return packing.last(hidden)

    def finish_last(self, hidden: Tensor, layout: Packing) -> Tensor:
        """What the last block is given [N, D] -> the states that rank the next item [B, D]."""
        finished = self.finish(layout.real(self.blocks[-1](hidden, layout)))
        return self.last(finished, layout.read)

    def for_ranking(self, item_ids: Tensor) -> Tensor:
        """Histories [B, L] -> what is read to rank their next item, at whose last real position it
        is scored.
        """
        return item_ids

    def contrast(
        self, first: Tensor, second: Tensor, present: Tensor, num_present: int | None = None
    ) -> tuple[Tensor, float]:
        """The contrastive term over two views of each history, and its weight in the loss.

        Args:
            first: [B, D] states of the first views at their last positions.
            second: [B, D] of the second views.
            present: [B] bool, False for a row that only fills the batch.
            num_present: How many rows are present, where it is known.

        Returns:
            Scalar, the sum over present histories, and the weight.
        """
        raise NotImplementedError

    def pack(self, item_ids: Tensor, lengths: Lengths = None) -> Packing:
        """The positions that blocks compute on; those of :attr:`Packing.read` are read by MLTFR and
        scored.

        Args:
            item_ids: [B, L].
            lengths: Of its rows, where they are known.
        """
        return Packing(item_ids, lengths)

    def inputs(self, item_ids: Tensor) -> tuple[Tensor, Packing]:
        """Item ids [B, L] -> what MLTFR reads: input embeddings [N, D], and where they stand."""
        layout = self.pack(item_ids)
        return layout.real(self.enter(layout)), layout.read

    def enter(self, layout: Packing) -> Tensor:
        """Input embeddings [N, D] of the positions that blocks compute on."""
        return self.embed(layout.pack(layout.item_ids), layout.columns)


class PositionalBackbone(Backbone):
    """Item + position embeddings, a stack of blocks, a final layer norm. A subclass says what a
    block is.

    Positions count from the oldest item, as padding stands behind.
    """

    num_special_items: ClassVar[int] = 0
    """Rows of ``item_embedding`` above num_items: 1 where there is a mask, whose id is num_items +
    1.
    """

    num_special_positions: ClassVar[int] = 0
    """Positions beyond max_len that the backbone itself adds to a history."""

    def __init__(self, config: BackboneConfig, num_items: int, max_len: int) -> None:
        super().__init__(config, num_items, max_len)
        dim = config.hidden_dim
        self.num_items = num_items
        self.item_embedding = ItemEmbedding(num_items + 1 + self.num_special_items, dim)
        self.position_embedding = nn.Embedding(max_len + self.num_special_positions, dim)
        self.input_norm = nn.LayerNorm(dim)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            self.make_block(config, max_len) for _ in range(config.num_layers)
        )
        self.output_norm: nn.Module = nn.LayerNorm(dim)
        self.apply(init_weights)

    def make_block(self, config: BackboneConfig, max_len: int) -> nn.Module:
        """One block of the stack, (x [N, D], :class:`Packing`) -> [N, D]."""
        raise NotImplementedError

    def embed(self, item_ids: Tensor, positions: Tensor) -> Tensor:
        """Item ids [N] and positions [N] -> item + position embeddings [N, D]."""
        summed = self.item_embedding(item_ids) + self.position_embedding(positions)
        return self.dropout(self.input_norm(summed))  # type: ignore[no-any-return]

    def finish(self, hidden: Tensor) -> Tensor:
        """Final layer norm, [N, D]."""
        return self.output_norm(hidden)  # type: ignore[no-any-return]


def backbone_class(name: str) -> type[Backbone]:
    """The class that the registry names."""
    backbone: type[Backbone] = load(BACKBONES[name].path, "mltfr_dist.models")
    return backbone
