"""Clipping to one norm of all gradients, where DeepSpeed holds only a part of them.

DeepSpeed forms the norm of what it holds and clips by it, in one place at stage 0 and in another at
stages 1 to 3; both are given the norm of everything instead. And stages 1 and 2 ask a GPU for
numbers on the way, which need not leave it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.numerics import norms

EPSILON = 1e-6
"""What DeepSpeed and torch add to a norm before they divide by it."""


def total_norm(model: nn.Module) -> Tensor:
    """Norm of all gradients, as DeepSpeed forms it at stages 1 to 3: of squares in float64; on a
    GPU each gradient's own in fp32, by a few launches for all of them together.
    """
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    on_cpu = grads[0].device.type == "cpu"
    each = [torch.linalg.vector_norm(grad.double()) for grad in grads] if on_cpu else norms(grads)
    return torch.stack(each).double().square().sum().float().sqrt()


class JointNorm:
    """The norm of DeepSpeed's gradients and of others."""

    def __init__(self, deepspeed: Any, zero_stage: int, max_norm: float | None) -> None:
        """Args: deepspeed: its engine; zero_stage: of it; max_norm: what to clip to, None for no
        clipping.
        """
        self.rest = torch.zeros(())
        """Squared norm of the gradients that DeepSpeed does not hold, to be set before each of its
        steps.
        """
        self._deepspeed, self._max_norm, self._norm = deepspeed, max_norm, torch.zeros(())
        if max_norm is None:
            return
        if zero_stage == 0:
            deepspeed.clip_fp32_gradients = self._clip
        else:
            unscale = deepspeed.optimizer.unscale_and_clip_grads
            deepspeed.optimizer.unscale_and_clip_grads = lambda gradient, norm: unscale(
                gradient, self._join(norm)
            )

    def _clip(self) -> None:
        parameters = [p for p in self._deepspeed.module.parameters() if p.grad is not None]
        assert self._max_norm is not None
        clip_grads_with_norm_(
            parameters, self._max_norm, self._join(get_total_norm([p.grad for p in parameters]))
        )

    def _join(self, norm: Tensor) -> Tensor:
        self._norm = (norm.square() + self.rest.to(norm.device)).sqrt()
        return self._norm

    def scale(self) -> float:
        """Factor by which the last step clipped DeepSpeed's gradients, and the others are to be."""
        return (
            1.0
            if self._max_norm is None
            else min(1.0, self._max_norm / (float(self._norm) + EPSILON))
        )


def may_be_asked(device: torch.device) -> bool:
    """Whether asking ``device`` for a number costs nothing: it has done all that it was told."""
    return device.type == "cpu"


class NormOnDevice:
    """Stages 1 and 2 without waiting for a GPU: the norm, whether it is finite, and clipping by it.

    DeepSpeed waits six times a step for these. What is not finite by itself is seen in `health.py`,
    and an optimizer that heeds ``found_inf`` need not be told on the host that it is to skip.
    """

    norm: Tensor
    """Scalar fp32, of the last step before clipping."""

    def __init__(
        self, zero: Any, max_norm: float | None, ranks: Ranks, note: Callable[[Tensor], None]
    ) -> None:
        """Take the place of what DeepSpeed does.

        Args:
            zero: Its optimizer.
            max_norm: What to clip to; None for no clipping.
            ranks: All processes.
            note: Gets the norm before the optimizer's step.
        """
        self._zero, self._max_norm, self._ranks, self._note = zero, max_norm, ranks, note
        zero.check_grad_overflow = False
        zero.scaled_global_norm = self._form
        zero.unscale_and_clip_grads = self._clip

    def _form(self, norm_type: int = 2) -> float:
        """Form :attr:`norm`. DeepSpeed gets a number that stands for nothing: of a tensor it would
        ask whether it is finite.
        """
        held = self._zero.averaged_gradients
        pieces = [
            gradient
            for group in range(len(self._zero.bit16_groups))
            for gradient in held[group]
            if not getattr(gradient, "_zero_padding", False)
        ]
        own = torch.stack(norms(pieces)).double().square().sum() if pieces else self._nothing()
        self.norm = self._ranks.sum(own).sqrt().float()
        self._note(self.norm)
        return 0.0

    def _nothing(self) -> Tensor:
        return torch.zeros((), dtype=torch.float64, device=self._ranks.device)

    def _clip(self, gradients: Sequence[Tensor], _: float) -> None:
        """As DeepSpeed does, with :attr:`norm`."""
        if self._max_norm is not None:
            divisor = ((self.norm + EPSILON) / self._max_norm).clamp(min=1.0)
            for gradient in gradients:
                gradient.mul_(1.0 / divisor)
