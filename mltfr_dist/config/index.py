"""Configuration of `mltfr index`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from mltfr_dist.schema import Count, Fraction, Options

USED_BY = {
    "nlist": ("ivf", "ivf_pq"),
    "nprobe": ("ivf", "ivf_pq"),
    "recall": ("ivf", "ivf_pq"),
    "code_bytes": ("pq", "ivf_pq"),
}
"""Options that only some types have."""


class IndexConfig(Options):
    """`mltfr index`: the item vectors of a model as a FAISS index."""

    listed_by: ClassVar[str] = "index"

    type: Literal["flat", "ivf", "pq", "ivf_pq"] = Field(
        "ivf",
        description="flat: every vector is compared; ivf: those of the lists nearest to the "
        "history; pq: short codes in place of vectors; ivf_pq: both.",
    )
    nlist: Count | None = Field(
        None,
        description="ivf, ivf_pq: lists that the items are put into; 4 sqrt(items), with 39 items "
        "each at least, when not given.",
    )
    nprobe: Count | None = Field(
        None,
        description="ivf, ivf_pq: lists that a search reads; the smallest power of two that "
        "reaches --recall when not given.",
    )
    code_bytes: Count | None = Field(
        None,
        description="pq, ivf_pq: bytes of an item's code, a divisor of the hidden size; the "
        "largest up to a quarter of it when not given.",
    )
    k: Count = Field(10, description="Items of a search of which recall is measured.")
    recall: Fraction | None = Field(
        None,
        description="ivf, ivf_pq: recall at k that nprobe is chosen to reach; 0.95 when not given.",
    )
    users: Count = Field(1000, description="Histories that recall is measured on, the first ones.")

    @model_validator(mode="after")
    def _options_fit_the_type(self) -> IndexConfig:
        for name, types in USED_BY.items():
            if getattr(self, name) is not None and self.type not in types:
                raise ValueError(
                    f"{name} belongs to the types {' and '.join(types)}, and the type is "
                    f"{self.type}"
                )
        if self.nprobe is not None and self.recall is not None:
            raise ValueError("nprobe and recall exclude each other: recall is what nprobe is for")
        return self
