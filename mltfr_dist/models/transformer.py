"""Transformer blocks shared by the attention backbones.

Shapes: B users, L positions, N real positions (no padding), D hidden size, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mltfr_dist.models.dropout import Dropout
from mltfr_dist.models.initial import ItemEmbedding
from mltfr_dist.models.kernels import attend_histories
from mltfr_dist.models.packing import Packing, Padded
from mltfr_dist.numerics import at_least_fp32


class SelfAttention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017), causal or over the whole history.

    ``weight_dropout`` is the probability for attention weights.
    """

    def __init__(
        self, hidden_dim: int, num_heads: int, *, causal: bool = True, weight_dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.num_heads, self.causal, self.weight_dropout = num_heads, causal, weight_dropout
        self.qkv = nn.Linear(hidden_dim, 3 * hidden_dim)
        self.out = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """[N, D] -> [N, D]; causal: position t of a history sees its positions <= t, and so never
        the padding behind.
        """
        heads = self.qkv(x).view(x.shape[0], 3, self.num_heads, x.shape[-1] // self.num_heads)
        dropout_p = self.weight_dropout * self.training
        return self.out(attended(heads, packing, causal=self.causal, dropout_p=dropout_p))  # type: ignore[no-any-return]

    def last(self, x: Tensor, packing: Packing) -> Tensor:
        """[N, D] -> [B, D], what the last real position of each history has read, outside of
        training; not of :class:`Padded` histories.
        """
        head_dim = x.shape[-1] // self.num_heads
        query, key, value = self.qkv(x).view(len(x), 3, self.num_heads, head_dim).unbind(1)
        rows = packing.rows
        scores = at_least_fp32(packing.last(query)[rows] * key).sum(-1) / head_dim**0.5  # [N, H]
        padding = ~packing.valid_mask[..., None]
        weights = packing.pack(packing.unpack(scores).masked_fill(padding, -torch.inf).softmax(1))
        read = weights.new_zeros(len(packing.item_ids), self.num_heads, head_dim)
        read.index_add_(0, rows, weights[..., None] * value)
        return self.out(read.flatten(1).to(x.dtype))  # type: ignore[no-any-return]


def attended(qkv: Tensor, packing: Packing, *, causal: bool, dropout_p: float) -> Tensor:
    """Queries, keys and values [N, 3, H, D / H] of packed positions -> what each has read, [N,
    D].
    """
    if dropout_p == 0 and type(packing) is Packing:  # others have masks of their own
        read = attend_histories(qkv, packing.starts, causal=causal)
        if read is not None:
            return read
    mixed = []
    for some, group in packing.divided(qkv):
        query, key, value = group.unpack(some).permute(2, 0, 3, 1, 4)  # [B, H, L, D/H]
        mask = None
        if isinstance(group, Padded):
            mask = group.causal_mask[:, None]
        elif not causal:
            valid = group.valid_mask[:, None]  # [B, 1, L]
            # Padding is no key. What padding itself would read is thrown away: it sees all, so that
            # no row is empty.
            mask = valid[:, :, None] | ~valid[..., None]  # [B, 1, L, L]
        # By default no dropout on attention weights, which would forbid the fused kernels: the
        # output is dropped out instead.
        read = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout_p,
            is_causal=causal and mask is None,
        )
        mixed.append(group.pack(read.transpose(1, 2).flatten(2)))
    return torch.cat(mixed)


class TransformerBlock(nn.Module):
    """Pre-norm block: attention and a position-wise feed-forward of inner size 4 D, each with a
    residual.
    """

    def __init__(self, hidden_dim: int, dropout: float, attention: nn.Module) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_dim)
        self.attention = attention
        self.feed_forward_norm = nn.LayerNorm(hidden_dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(hidden_dim, 4 * hidden_dim),
            nn.GELU(),
            Dropout(dropout),
            nn.Linear(4 * hidden_dim, hidden_dim),
        )
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """[N, D] -> [N, D]."""
        return self._fed_forward(x + self.dropout(self.attention(self.attention_norm(x), packing)))

    def last(self, x: Tensor, packing: Packing) -> Tensor:
        """[N, D] -> [B, D], at the last real position of each history alone; see
        :meth:`SelfAttention.last`.
        """
        assert isinstance(self.attention, SelfAttention)
        read = self.attention.last(self.attention_norm(x), packing)
        return self._fed_forward(packing.last(x) + self.dropout(read))

    def _fed_forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))  # type: ignore[no-any-return]


class PostNormBlock(nn.Module):
    """Attention and a feed-forward of inner size 4 D, each with a residual and a norm behind it."""

    def __init__(self, hidden_dim: int, dropout: float, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.attention_norm = nn.LayerNorm(hidden_dim)
        self.feed_forward = nn.Sequential(
            nn.Linear(hidden_dim, 4 * hidden_dim), nn.GELU(), nn.Linear(4 * hidden_dim, hidden_dim)
        )
        self.feed_forward_norm = nn.LayerNorm(hidden_dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        """[N, D] -> [N, D]."""
        x = self.attention_norm(x + self.dropout(self.attention(x, packing)))
        x = self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))
        return x


def init_weights(module: nn.Module, std: float = 0.02) -> None:
    """Initialise ``module`` itself (use with ``Module.apply``): N(0, std) matrices, zero biases,
    unit norms.

    Item tables draw their own rows (``initial.py``).
    """
    if isinstance(module, nn.Linear | nn.Embedding) and not isinstance(module, ItemEmbedding):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
