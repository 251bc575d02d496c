"""BERT4Rec's own settings."""

from __future__ import annotations

from pydantic import Field

from mltfr_dist.schema import Fraction, Section


class BERT4RecConfig(Section):
    """bert4rec's own."""

    mask_ratio: Fraction = Field(
        0.2, description="Share of positions that are masked and predicted in training."
    )
