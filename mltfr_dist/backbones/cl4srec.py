"""CL4SRec's own settings."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from mltfr_dist.schema import Fraction, NonNegative, Positive, Section


class CL4SRecConfig(Section):
    """cl4srec's own: how views of a history are made, and how they are contrasted."""

    crop_ratio: Fraction = Field(0.6, description="Share of the history that a cropped view keeps.")
    mask_ratio: Fraction = Field(0.2, description="Share of positions masked in a masked view.")
    reorder_ratio: Fraction = Field(
        0.6, description="Share of the history that a reordered view shuffles."
    )
    contrast_weight: NonNegative = Field(
        0.1, description="Weight of the contrastive term, per sequence."
    )
    contrast_temperature: Positive = Field(
        1.0, description="Products of two views are divided by it."
    )
    contrast_group: Annotated[int, Field(ge=2)] = Field(
        16,
        description="Sequences whose views are each other's negatives; divides the micro-batch of "
        "a rank.",
    )
