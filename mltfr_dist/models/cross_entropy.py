"""Softmax cross-entropy over all items, in chunks of positions and tiles of items.

Shapes: N scored positions, n of a chunk, D hidden size, I items, i of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mltfr_dist.models.kernels import exponentials
from mltfr_dist.numerics import at_least_fp32

CHUNK_ROWS = 64
"""Positions of a chunk at least: each passes over the whole item table and over its gradient."""

CACHED_ELEMENTS = 64 * 12_288
"""Logits that are treated together on a CPU (3 MiB in fp32), so that they stay in its cache."""

GPU_ELEMENTS = 1 << 26
"""Logits held at a time on a GPU (256 MiB in fp32), which wants large products."""


def chunk_shape(num_items: int, device: str) -> tuple[int, int]:
    """Positions whose logits :func:`full_cross_entropy` holds, and items that it treats together.

    Memory in fp32: logits of at most 3 MiB on a CPU and 256 MiB on a GPU, or 256 bytes an item
    (which an item table of 64 columns takes too), whichever is more.

    Args:
        num_items: I.
        device: "cpu" or a GPU's type.
    """
    if device != "cpu":
        return max(CHUNK_ROWS, GPU_ELEMENTS // num_items), num_items
    tiles = -(-num_items // (CACHED_ELEMENTS // CHUNK_ROWS))
    return max(CHUNK_ROWS, CACHED_ELEMENTS // num_items), -(-num_items // tiles)


class _LinearCrossEntropy(torch.autograd.Function):
    """Softmax cross-entropy of ``hidden @ weight.T`` that never holds more than a chunk of logits.

    The gradient is formed beside the loss while a chunk is at hand: three matrix products, as
    usual, and memory that does not grow with N * I. Exponentials are not normalised: sums of them
    divide the [n, D] products instead. Where the items come in several tiles, each is shifted by
    the largest logit so far, and what came before is scaled to it (Milakov and Gimelshein 2018).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, table: Tensor, targets: Tensor, weights: Tensor, items: slice
    ) -> Tensor:
        needs_grad = hidden.requires_grad or table.requires_grad
        weight = table[items]
        rows, width = chunk_shape(len(weight), hidden.device.type)
        grad_hidden = at_least_fp32(torch.zeros_like(hidden)) if needs_grad else hidden
        grad_table = at_least_fp32(torch.zeros_like(table)) if needs_grad else table
        grad_weight = grad_table[items]
        totals = at_least_fp32(hidden.new_empty(len(hidden), 1))
        tops = torch.full_like(totals, -torch.inf)
        position_weights = weights[:, None].to(totals.dtype)  # [N, 1]
        tiles, of_tiles = torch.split(weight, width), torch.split(grad_weight, width)
        kept = hidden.new_empty(min(rows, len(hidden)) * len(weight))
        powers: list[Tensor] = []
        by_position = (hidden, grad_hidden, totals, tops, position_weights)
        chunks = (torch.split(t, rows) for t in by_position)
        for h, of_h, total, largest, weight_of in zip(*chunks, strict=True):
            if not powers or len(h) != len(powers[0]):  # the first chunk, and a shorter last one
                powers = _buffers(kept, len(h), tiles)
            shifts: list[Tensor] = []
            for tile, power in zip(tiles, powers, strict=True):
                shift, sums = _exponentials(torch.mm(h, tile.T, out=power), largest)
                if shifts:
                    rescale = (largest - shift).exp_()
                    sums += total * rescale
                    if needs_grad:
                        of_h *= rescale
                if needs_grad:
                    _add_product(of_h, power, tile)
                total.copy_(sums)
                largest.copy_(shift)
                shifts.append(shift)
            if needs_grad:
                share = weight_of / total
                for of_tile, power, shift in zip(of_tiles, powers, shifts, strict=True):
                    shares = share if len(tiles) == 1 else share * (shift - largest).exp_()
                    _add_product(of_tile, power.T, (h * shares).to(h.dtype))
        chosen = weight.index_select(0, targets)  # [N, D]
        logits = at_least_fp32(hidden * chosen).sum(1, keepdim=True)
        if needs_grad:
            grad_hidden *= position_weights / totals
            grad_hidden -= position_weights * chosen
            grad_weight.index_add_(0, targets, -position_weights * hidden)
        ctx.save_for_backward(grad_hidden.to(hidden.dtype), grad_table.to(table.dtype))
        return (position_weights * (totals.log() + tops - logits)).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (grad_total,) = grad_outputs
        grad_hidden, grad_table = ctx.saved_tensors
        return (
            grad_hidden * grad_total.to(grad_hidden.dtype),
            grad_table * grad_total.to(grad_table.dtype),
            None,
            None,
            None,
        )


def _buffers(kept: Tensor, rows: int, tiles: Sequence[Tensor]) -> list[Tensor]:
    """Room for the logits [rows, i] of each tile [i, D], at the beginning of ``kept``."""
    sizes = [rows * len(tile) for tile in tiles]
    parts = torch.split(kept[: sum(sizes)], sizes)
    return [part.view(rows, len(tile)) for part, tile in zip(parts, tiles, strict=True)]


def _exponentials(logits: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Turn ``logits`` [n, i] into exponentials of what they are above the larger of ``largest``
    [n, 1] and their own largest; returns that [n, 1], and their sums [n, 1].
    """
    if in_one_pass := exponentials(logits, largest):
        return in_one_pass
    values = at_least_fp32(logits)
    shift = torch.maximum(largest, values.amax(dim=1, keepdim=True))
    sums = values.sub_(shift).exp_().sum(dim=1, keepdim=True)
    if values.dtype != logits.dtype:
        logits.copy_(values)
    return shift, sums


def _add_product(into: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a matrix product to ``into``, which is in fp32 where the product is not."""
    if into.dtype == left.dtype:
        into.addmm_(left, right)
    else:
        into += left @ right


def full_cross_entropy(
    hidden: Tensor,
    item_vectors: Tensor,
    targets: Tensor,
    weights: Tensor,
    items: slice = slice(None),
) -> Tensor:
    """Softmax cross-entropy over all items.

    Args:
        hidden: [N, D] hidden states of the real positions.
        item_vectors: [I, D] output vectors of items 1..I (no padding row), or a table of which
            these are the rows ``items``.
        targets: [N] item ids, 1..I.
        weights: [N] weight of each position.
        items: The items' rows; their gradient is then made once, where the table's is.

    Returns:
        Scalar, the weighted sum, in fp32 at least.
    """
    result: Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, item_vectors, targets - 1, weights, items
    )
    return result
