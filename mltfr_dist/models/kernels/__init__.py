"""Kernels in C++ for fp32 on a CPU; each has a plain path in torch beside it, which gives the
same but for rounding.
"""

from __future__ import annotations

from mltfr_dist.models.kernels.attention import attend
from mltfr_dist.models.kernels.blocks import Blocks, block_means
from mltfr_dist.models.kernels.build import usable
from mltfr_dist.models.kernels.finite import nonfinite
from mltfr_dist.models.kernels.histories import attend_histories
from mltfr_dist.models.kernels.masks import draw_masks
from mltfr_dist.models.kernels.mixing import masked_by, mix
from mltfr_dist.models.kernels.nearest import largest_products, nearest
from mltfr_dist.models.kernels.noise import noisy_candidates
from mltfr_dist.models.kernels.projection import (
    map_rows,
    row_maxima,
    unit_backward,
    unit_vectors,
)
from mltfr_dist.models.kernels.ranking import (
    LeftOut,
    count_between,
    counts_in_registers,
    leaders,
    leads_in_registers,
)
from mltfr_dist.models.kernels.softmax import exponentials
from mltfr_dist.models.kernels.weighing import used_rows, weigh_kept
from mltfr_dist.models.kernels.work import kernel_flops

__all__ = [
    "Blocks",
    "LeftOut",
    "attend",
    "attend_histories",
    "block_means",
    "count_between",
    "counts_in_registers",
    "draw_masks",
    "exponentials",
    "kernel_flops",
    "largest_products",
    "leaders",
    "leads_in_registers",
    "map_rows",
    "masked_by",
    "mix",
    "nearest",
    "noisy_candidates",
    "nonfinite",
    "row_maxima",
    "unit_backward",
    "unit_vectors",
    "usable",
    "used_rows",
    "weigh_kept",
]
