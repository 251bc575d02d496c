"""BSARec's own settings."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mltfr_dist.schema import Count, Section


class BSARecConfig(Section):
    """bsarec's and bsarec_original's own."""

    low_frequencies: Count = Field(
        3,
        description="Fourier components from 0 on that count as low; for 3 the released code's c "
        "is 5.",
    )
    inductive_bias: Annotated[float, Field(ge=0, le=1)] = Field(
        0.7, description="alpha, weight of the frequency filter; self-attention has the rest."
    )
