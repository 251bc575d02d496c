"""A trained model whose shapes depend on nothing but the number of histories, as ONNX needs it.

Every history is padded to W = max_len, all positions are computed, and padding is masked where it
would be read. All tables are folded; transforms along the sequence are the matrices that they are.
The maths is the model's, the order of sums is not: scores agree to rounding.

Shapes: B histories, L positions given, W positions computed, n positions a query block, D hidden
size, S rows of a table.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mltfr_dist.data.batch import PADDING_IDX
from mltfr_dist.models.backbone import PositionalBackbone
from mltfr_dist.models.bsarec import FrequencyFilter
from mltfr_dist.models.bsarec_original import WholeFrequencyFilter
from mltfr_dist.models.fmlp import SequenceFilter
from mltfr_dist.models.fmlp_original import SpectralFilter
from mltfr_dist.models.folded import Stored, folded
from mltfr_dist.models.mltfr import MLTFR
from mltfr_dist.models.packing import Packing, Padded
from mltfr_dist.models.padded import PaddedBackbone
from mltfr_dist.models.placed_table import PlacedTable
from mltfr_dist.models.query_blocks import QueryBlocks, prefix_mean
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.models.selectors import Queries, Selection, Selector
from mltfr_dist.models.selectors.user_guided import UserGuided


class Dense(Packing):
    """All B W positions of histories that begin at 0."""

    def __init__(self, item_ids: Tensor) -> None:
        """Args: item_ids: [B, W], padding behind."""
        self.item_ids = item_ids
        self.valid_mask, self.batch_shape = item_ids != PADDING_IDX, item_ids.shape
        self.num_items = self.valid_mask.sum(1)

    @property
    def columns(self) -> Tensor:
        """[B W] position in the history."""
        positions = torch.arange(self.batch_shape[1], device=self.item_ids.device)
        return positions.expand(self.batch_shape).flatten()

    def divided(self, packed: Tensor) -> list[tuple[Tensor, Packing]]:
        """All of it, in one part."""
        return [(packed, self)]

    def pack(self, padded: Tensor) -> Tensor:
        """[B, W, ...] -> [B W, ...]."""
        return padded.flatten(0, 1)

    def unpack(self, packed: Tensor) -> Tensor:
        """[B W, ...] -> [B, W, ...], zero at padding."""
        padded = packed.reshape(*self.batch_shape, *packed.shape[1:])
        mask = self.valid_mask.view(*self.batch_shape, *(1,) * (padded.ndim - 2))
        return torch.where(mask, padded, padded.new_zeros(()))

    def last(self, packed: Tensor, back: int = 0) -> Tensor:
        """[B W, D] -> [B, D], each row's last real position."""
        padded = packed.reshape(*self.batch_shape, *packed.shape[1:])
        ends = (self.num_items - 1 - back)[:, None, None].expand(-1, 1, padded.shape[-1])
        return padded.gather(1, ends)[:, 0]


class DensePadded(Padded):
    """Whole sequences in which padding is computed on as items are, and their histories as
    :class:`Dense`.
    """

    def __init__(self, item_ids: Tensor, *, in_front: bool) -> None:
        """Args: item_ids: [B, W], padding behind; in_front: where it goes."""
        self._read = Dense(item_ids)
        self.batch_shape, self.in_front = item_ids.shape, in_front
        width = item_ids.shape[1]
        positions = torch.arange(width, device=item_ids.device)
        missing = (width - self._read.num_items)[:, None] * in_front  # [B, 1]
        self._index = (positions + missing).clamp(max=width - 1)  # [B, W] of each read position
        self._origin = positions - missing  # [B, W] the read position of each position
        moved = item_ids.gather(1, self._origin.clamp(min=0))
        self.item_ids = torch.where(self._origin >= 0, moved, PADDING_IDX)
        self.valid_mask = torch.ones_like(item_ids, dtype=torch.bool)

    @property
    def columns(self) -> Tensor:
        """[B W] position in the sequence."""
        positions = torch.arange(self.batch_shape[1], device=self._index.device)
        return positions.expand(self.batch_shape).flatten()

    def divided(self, packed: Tensor) -> list[tuple[Tensor, Packing]]:
        """All of it, in one part."""
        return [(packed, self)]

    def pack(self, padded: Tensor) -> Tensor:
        """[B, W, ...] -> [B W, ...]."""
        return padded.flatten(0, 1)

    def unpack(self, packed: Tensor) -> Tensor:
        """[B W, ...] -> [B, W, ...]."""
        return packed.reshape(*self.batch_shape, *packed.shape[1:])

    def real(self, x: Tensor) -> Tensor:
        """[B W, D] in sequence positions -> [B W, D] in read positions."""
        return self._moved(x, self._index).flatten(0, 1)

    def spread(self, x: Tensor) -> Tensor:
        """[B W, D] in read positions -> [B W, D] in sequence positions, zero at padding."""
        moved = self._moved(x, self._origin.clamp(min=0))
        real = (self.item_ids != PADDING_IDX)[..., None]
        return torch.where(real, moved, moved.new_zeros(())).flatten(0, 1)

    def _moved(self, x: Tensor, positions: Tensor) -> Tensor:
        padded = x.reshape(*self.batch_shape, *x.shape[1:])
        return padded.gather(1, positions[..., None].expand(-1, -1, padded.shape[-1]))


class DenseBlocks(QueryBlocks):
    """All blocks of all histories, occupied or not."""

    def __init__(self, x: Tensor, packing: Packing, block_len: int) -> None:
        """Args: x: [B W, D]; packing: a dense one; block_len: n."""
        self.packing, self.block_len = packing, block_len
        padded = packing.unpack(x)
        self.positions = self._cut(padded).flatten(0, 1)
        self.queries = self.at_queries(prefix_mean(padded, packing.valid_mask)).flatten(0, 1)

    def _cut(self, t: Tensor) -> Tensor:
        """[B, W, D] -> [B, ceil(W / n), n, D], zero behind."""
        padded = F.pad(t, (0, 0, 0, -t.shape[1] % self.block_len))
        return padded.reshape(t.shape[0], -1, self.block_len, t.shape[2])

    def keys(self) -> None:
        """Nothing draws here."""

    def at_real(self, t: Tensor) -> Tensor:
        """[B ceil(W / n), n, D] -> [B W, D], zero at padding."""
        mask = self.packing.valid_mask
        blocks = -(-mask.shape[1] // self.block_len)
        whole = t.reshape(-1, blocks, *t.shape[1:]).flatten(1, 2)[:, : mask.shape[1]]
        return torch.where(mask[..., None], whole, whole.new_zeros(())).flatten(0, 1)


class DenseSearch(Selector):
    """The user-guided filter over rows that stand as unit vectors, all of them compared."""

    unit_rows: Tensor
    log_temperature: Tensor

    def __init__(self, selector: UserGuided, unit_rows: Tensor) -> None:
        """Args: selector: whose; unit_rows: [S, D]."""
        nn.Module.__init__(self)
        self.num_kept = min(selector.num_kept, len(unit_rows))
        self.register_buffer("unit_rows", unit_rows)
        self.register_buffer("log_temperature", selector.log_tau().detach().float())

    def forward(self, queries: Queries, table: PlacedTable) -> Selection:
        """Keep the K best of each query."""
        scores = F.normalize(queries.vectors, dim=-1) @ self.unit_rows.T
        values, kept = scores.topk(self.num_kept, dim=1)
        weights = F.log_softmax(values / self.log_temperature.exp(), dim=-1)
        return Selection(self.unit_rows, kept, kept, weights)


class ChannelMatrix(nn.Module):
    """A linear map along the sequence, one of each channel."""

    matrix: Tensor
    """[W, W, D], to, from, channel."""

    def __init__(self, sequence_map: nn.Module, width: int, dim: int) -> None:
        """Args: sequence_map: [B, W, D] -> [B, W, D]; width: W; dim: D."""
        super().__init__()
        units = torch.eye(width)[..., None].expand(width, width, dim)
        self.register_buffer("matrix", sequence_map(units.contiguous()).transpose(0, 1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, W, D] -> [B, W, D]."""
        return torch.einsum("tsd,bsd->btd", self.matrix, x)


class DenseModel(nn.Module):
    """Histories to scores, without any shape that depends on their lengths."""

    def __init__(self, model: Recommender, max_len: int) -> None:
        """Args: model: trained, on the CPU; max_len: W."""
        super().__init__()
        self.max_len = max_len
        with torch.no_grad():
            self.model = _dense(model, max_len)

    def forward(self, item_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Histories [B, L], L <= W, padding behind -> scores [B, num_items + 1], -inf for padding,
        and user vectors [B, D].
        """
        batch = item_ids.shape[0]
        item_ids = torch.cat([item_ids, item_ids.new_zeros(batch, self.max_len)], dim=1)
        ranked = self.model.backbone.for_ranking(item_ids[:, : self.max_len])
        hidden, packing, _ = self.model.hidden(ranked)
        users = self.model.backbone.last(hidden, packing)
        scores = users @ self.model.backbone.item_embedding.weight[1 : self.model.num_items + 1].T
        return torch.cat([scores.new_full((batch, 1), -torch.inf), scores], dim=1), users


def _dense(model: Recommender, max_len: int) -> Recommender:
    lean = copy.deepcopy(folded(model, whole_tables=True)).eval()
    backbone = lean.backbone
    vectors = backbone.item_embedding.weight.detach().clone()
    backbone.item_embedding = nn.Embedding(len(vectors), vectors.shape[1], _weight=vectors)
    width = max_len
    if isinstance(backbone, PositionalBackbone):
        width += backbone.num_special_positions
    if isinstance(backbone, PaddedBackbone):
        in_front = backbone.pads_in_front
        backbone.pack = lambda item_ids, lengths=None: DensePadded(item_ids, in_front=in_front)  # type: ignore[method-assign]
    else:
        backbone.pack = lambda item_ids, lengths=None: Dense(item_ids)  # type: ignore[method-assign]
    dim = vectors.shape[1]
    for parent in list(backbone.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, SequenceFilter | SpectralFilter):
                setattr(parent, name, ChannelMatrix(child, width, dim))
            elif isinstance(child, WholeFrequencyFilter):
                setattr(parent, name, _as_matrix(child, width, dim))
    if lean.mltfr is not None:
        _densify(lean.mltfr)
    return lean


def _as_matrix(whole: WholeFrequencyFilter, width: int, dim: int) -> FrequencyFilter:
    lowest = torch.fft.rfft(torch.eye(width), dim=0)[: whole.num_frequencies]
    made = FrequencyFilter(dim, torch.fft.irfft(lowest, n=width, dim=0))
    made.beta = whole.beta
    return made


def _densify(mltfr: MLTFR) -> None:
    mltfr.components = mltfr.components._replace(blocks=DenseBlocks)
    for m in range(mltfr.num_tables):
        selector = mltfr.selector(m)
        if isinstance(selector, UserGuided):
            assert isinstance(selector.projection, Stored)
            mltfr.selectors[m] = DenseSearch(selector, selector.projection.values)
