"""Rows of a table as unit vectors in the user space.

Shapes: S rows, D_in and D_out their widths before and after.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mltfr_dist.models.kernels import map_rows, unit_backward
from mltfr_dist.models.search import Project

PROJECTED_ROWS = 4096
"""Rows projected at a time, so that rows of another device or format are never all copied."""
PROJECTED_ELEMENTS = 1 << 24
"""Their numbers on a GPU (128 MiB in float64), where each time costs five launches."""
SHORTEST = 1e-12
"""Vectors are divided by no less, as ``F.normalize`` does."""


class Unit(NamedTuple):
    """What a projection makes of rows."""

    vectors: Tensor
    """[S, D_out] unit vectors."""
    lengths: Tensor
    """[S, 1] what they were divided by."""


class _Known(torch.autograd.Function):
    """A projection whose outputs are known: only the gradients of weight and bias are formed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor, known: Unit) -> Tensor:
        ctx.save_for_backward(rows, *known)
        return known.vectors.view_as(known.vectors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, Tensor, None]:
        rows, *known = ctx.saved_tensors
        of_mapped = unit_backward(gradient, *known)
        return None, of_mapped.T @ rows.to(of_mapped), of_mapped.sum(0), None


class Projection(nn.Linear):
    """Rows as unit vectors in another space, computed in any format from rows of any device.

    Rows are first brought to the parameters' format.
    """

    def forward(
        self,
        rows: Tensor,
        dtype: torch.dtype | None = None,
        *,
        lengths: Tensor | None = None,
        known: Unit | None = None,
    ) -> Tensor:
        """[S, D_in] -> unit vectors [S, D_out].

        Args:
            rows: [S, D_in].
            dtype: In which it is computed; None: that of the parameters.
            lengths: [S, 1], gets what the vectors are divided by; where no gradient is wanted.
            known: What it gives without gradient, where that is known and the rows are not trained:
                it is not computed again.
        """
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        if rows.requires_grad and torch.is_grad_enabled():
            return F.normalize(self.mapped(rows, weight, bias), dim=-1)
        if known is None:
            with torch.no_grad():
                known = self._known(rows, weight, bias)
        if lengths is not None:
            lengths.copy_(known.lengths)
        if not torch.is_grad_enabled():
            return known.vectors
        return _Known.apply(rows, weight, bias, known)  # type: ignore[no-untyped-call, no-any-return]

    def _known(self, rows: Tensor, weight: Tensor, bias: Tensor) -> Unit:
        by_kernel = map_rows(rows, weight, bias)
        if by_kernel is not None:
            return Unit(*by_kernel)
        made = Unit(weight.new_empty(len(rows), len(weight)), weight.new_empty(len(rows), 1))
        at_once = PROJECTED_ROWS
        if weight.device.type != "cpu":
            at_once = max(at_once, PROJECTED_ELEMENTS // rows.shape[1])
        parts = (torch.split(t, at_once) for t in (rows, *made))
        for block, vectors, lengths in zip(*parts, strict=True):
            mapped = self.mapped(block, weight, bias)
            lengths.copy_(mapped.norm(dim=-1, keepdim=True).clamp_min(SHORTEST))
            torch.div(mapped, lengths, out=vectors)
        return made

    def mapped(
        self, rows: Tensor, weight: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """[S, D_in] -> [S, D_out], not yet of unit length; by its own parameters, or the same in
        another format.
        """
        weight, bias = (weight, bias) if weight is not None else (self.weight, self.bias)
        return F.linear(rows.to(self.weight).to(weight), weight, bias)


class Once:
    """A projection that keeps what it made of the rows it was given last, in their own format."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.rows: Tensor | None = None
        self.unit: Tensor | None = None

    def __call__(self, rows: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Rows [S, D_in] -> unit vectors [S, D_out]."""
        if dtype is not None:
            return self.project(rows, dtype)
        if self.unit is None or self.rows is not rows:
            self.rows, self.unit = rows, self.project(rows)
        return self.unit
