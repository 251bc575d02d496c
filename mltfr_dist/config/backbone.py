"""The backbone recommender."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from mltfr_dist.backbones import BACKBONES
from mltfr_dist.backbones.bert4rec import BERT4RecConfig
from mltfr_dist.backbones.bsarec import BSARecConfig
from mltfr_dist.backbones.cl4srec import CL4SRecConfig
from mltfr_dist.schema import Count, Probability, Section, known


class BackboneConfig(Section):
    """The sequential recommender that MLTFR adds to."""

    name: Annotated[str, known(BACKBONES, "backbones")] = Field(
        "sasrec",
        description="; ".join(f"{name}: {entry.paper}" for name, entry in BACKBONES.items()) + ".",
    )
    hidden_dim: Count = Field(64, description="D, size of item embeddings and hidden states.")
    num_layers: Count = Field(
        2, description="Transformer blocks. MLTFR is added to the output of the first."
    )
    num_heads: Count = Field(2, description="Attention heads of a block; divides hidden_dim.")
    dropout: Probability = Field(
        0.2, description="Dropout probability on embeddings, attention output and feed-forward."
    )
    bert4rec: BERT4RecConfig = Field(BERT4RecConfig(), description="bert4rec's own.")
    bsarec: BSARecConfig = Field(BSARecConfig(), description="bsarec's and bsarec_original's own.")
    cl4srec: CL4SRecConfig = Field(CL4SRecConfig(), description="cl4srec's own.")

    @model_validator(mode="after")
    def _has_what_is_set(self) -> BackboneConfig:
        """Settings of another backbone would do nothing."""
        for section in {entry.settings for entry in BACKBONES.values()} - {""}:
            own, default = getattr(self, section), type(self).model_fields[section].default
            changed = [f for f in type(own).model_fields if getattr(own, f) != getattr(default, f)]
            having = [name for name, entry in BACKBONES.items() if entry.settings == section]
            if changed and self.name not in having:
                raise ValueError(
                    f"{section}.{changed[0]} is a setting of {' and '.join(having)}, and name is "
                    f"{self.name}: leave it out, or give name {having[0]}"
                )
        return self

    @model_validator(mode="after")
    def _heads_divide(self) -> BackboneConfig:
        if self.hidden_dim % self.num_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must divide hidden_dim ({self.hidden_dim})"
            )
        return self
