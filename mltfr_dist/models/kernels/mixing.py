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
    def forward(ctx: Any, gate: Tensor, masks: Sequence[Tensor | None], *outputs: Tensor) -> Tensor:
        kernels = library()
        assert kernels is not None
        gate, outputs = gate.contiguous(), tuple(output.contiguous() for output in outputs)
        mixed = torch.empty_like(outputs[0])
        read = (pointers(outputs), pointers(masks), pointer(gate))
        ctx.shape = (gate.numel() // len(outputs), mixed.shape[-1], len(outputs))
        kernels.mix(*read, pointer(mixed), *sizes(*ctx.shape))
        ctx.save_for_backward(gate, *masks, *outputs)
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        kernels = library()
        assert kernels is not None
        gate, *saved = ctx.saved_tensors
        masks, outputs = saved[: ctx.shape[2]], saved[ctx.shape[2] :]
        gradient = gradient.contiguous()
        of_gate, of_outputs = torch.empty_like(gate), [torch.empty_like(o) for o in outputs]
        read = (pointer(gradient), pointers(outputs), pointers(masks), pointer(gate))
        made = (pointers(of_outputs), pointer(of_gate))
        kernels.mix_backward(*read, *made, *sizes(*ctx.shape))
        return of_gate, None, *of_outputs


def mix(outputs: Sequence[Tensor], masks: Sequence[Tensor | None], gate: Tensor) -> Tensor:
    """Sum of the E outputs [..., D], each times its mask (None: ones) and its gate weight.

    Args:
        outputs: E times [..., D].
        masks: E times [..., D], without gradient.
        gate: [..., E].

    Returns:
        [..., D].
    """
    if usable(gate, *outputs) is not None:
        return _Mix.apply(gate, masks, *outputs)  # type: ignore[no-untyped-call, no-any-return]
    masked = [o if m is None else o * m for o, m in zip(outputs, masks, strict=True)]
    return torch.einsum("...de,...e->...d", torch.stack(masked, dim=-1), gate)
