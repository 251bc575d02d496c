"""Kernels in C++ for fp32 on a CPU; each has a plain path in torch beside it, which gives the
same but for rounding.
"""

from __future__ import annotations

from mltfr_dist.models.kernels.attention import attend, kept_products
from mltfr_dist.models.kernels.build import usable
from mltfr_dist.models.kernels.mixing import mix
from mltfr_dist.models.kernels.nearest import largest_products, nearest

__all__ = ["attend", "kept_products", "largest_products", "mix", "nearest", "usable"]
