"""The training loss."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mltfr_dist.losses import LOSSES
from mltfr_dist.schema import Count, Section, known


class LossConfig(Section):
    """The training loss, over real positions only."""

    name: Annotated[str, known(LOSSES, "losses")] = Field(
        "cross_entropy",
        description="; ".join(f"{name}: {entry.what}" for name, entry in LOSSES.items()) + ".",
    )
    num_negatives: Count = Field(
        1,
        description="bce, gbce: negatives per position, outside the user's whole history; "
        "sampled_softmax: items drawn per update, shared by its positions (256 is usual).",
    )
    proposal: Literal["uniform", "log_uniform"] = Field(
        "uniform",
        description="sampled_softmax: items are drawn evenly, or near Zipf's law by their rank in "
        "popularity.",
    )
    calibration: Annotated[float, Field(ge=0, le=1)] = Field(
        0.75, description="gbce: t; 0 is bce, 1 gives calibrated probabilities, less overconfident."
    )
