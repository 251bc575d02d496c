"""The experts' outputs, dropped out and added up by the gate, in one pass.

Shapes: D hidden size, E experts; dots stand for positions in any shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mltfr_dist.models.kernels.build import library, pointer, pointers, sizes, usable


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        masks: Sequence[Tensor | None],
        places: Tensor | None,
        *outputs: Tensor,
    ) -> Tensor:
        kernels = library()
        assert kernels is not None
        gate, outputs = gate.contiguous(), tuple(output.contiguous() for output in outputs)
        mixed = torch.empty_like(outputs[0])
        read = (pointers(outputs), pointers(masks), pointer(places), pointer(gate))
        ctx.shape = (gate.numel() // len(outputs), mixed.shape[-1], len(outputs))
        kernels.mix(*read, pointer(mixed), *sizes(*ctx.shape))
        ctx.save_for_backward(gate, places, *masks, *outputs)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kernels = library()
        assert kernels is not None
        gate, places, *saved = ctx.saved_tensors
        masks, outputs = saved[: ctx.shape[2]], saved[ctx.shape[2] :]
        gradient = gradient.contiguous()
        of_gate, of_outputs = torch.empty_like(gate), [torch.empty_like(o) for o in outputs]
        read = (pointer(gradient), pointers(outputs), pointers(masks), pointer(places))
        made = (pointers(of_outputs), pointer(of_gate))
        kernels.mix_backward(*read, pointer(gate), *made, *sizes(*ctx.shape))
        return of_gate, None, None, *of_outputs


def mix(
    outputs: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    gate: Tensor,
    places: Tensor | None = None,
) -> Tensor:
    """Sum of the E outputs [..., D], each times its mask (None: ones) and its gate weight.

    Args:
        outputs: E times [..., D].
        masks: E times [..., D], without gradient.
        gate: [..., E].
        places: [N], where masks have rows for more positions than the outputs [N, D]: which are
            whose; None: they have the outputs' shape.

    Returns:
        [..., D].
    """
    if usable(gate, *outputs) is not None:
        return _Mix.apply(gate, masks, places, *outputs)  # type: ignore[no-untyped-call, no-any-return]
    masked = [masked_by(o, m, places) for o, m in zip(outputs, masks, strict=True)]
    return torch.einsum("...de,...e->...d", torch.stack(masked, dim=-1), gate)


def masked_by(output: Tensor, mask: Tensor | None, places: Tensor | None) -> Tensor:
    """An output [..., D] times its mask, of which it has the rows ``places``; see :func:`mix`."""
    if mask is None:
        return output
    return output * (mask if places is None else mask.flatten(0, -2).index_select(0, places))
