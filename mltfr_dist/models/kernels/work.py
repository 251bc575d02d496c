"""The matrix work of the kernels of this process, which torch's counters do not see."""

from __future__ import annotations

_flops = 0


def did_products(number: int, width: int) -> None:
    """Count ``number`` products of ``width`` numbers, a multiplication and an addition for each."""
    global _flops
    _flops += 2 * number * width


def kernel_flops() -> int:
    """Floating-point operations of matrix products so far, by shapes: what a kernel leaves out, or
    does in fewer bits, counts as the product that it stands for.
    """
    return _flops
