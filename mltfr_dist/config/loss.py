"""The training loss."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mltfr_dist.schema import Count, Section


class LossConfig(Section):
    """The training loss, over real positions only."""

    name: Literal["cross_entropy", "sampled_softmax", "bce", "gbce"] = Field(
        "cross_entropy",
        description="cross_entropy: softmax over all items; sampled_softmax: over the target and sampled items, logQ-corrected; "
        "bce: binary, against sampled negatives; gbce: bce with a tempered positive (Petrov and Macdonald 2023).",
    )
    num_negatives: Count = Field(
        1,
        description="bce, gbce: negatives per position, outside the user's whole history; "
        "sampled_softmax: items drawn per update, shared by its positions (256 is usual).",
    )
    proposal: Literal["uniform", "log_uniform"] = Field(
        "uniform",
        description="sampled_softmax: items are drawn evenly, or near Zipf's law by their rank in popularity.",
    )
    calibration: Annotated[float, Field(ge=0, le=1)] = Field(
        0.75, description="gbce: t; 0 is bce, 1 gives calibrated probabilities, less overconfident."
    )
