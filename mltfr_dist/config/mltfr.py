"""MLTFR: tables, experts, router and consensus.

Shapes: V_m rows and D_m columns of token table m.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mltfr_dist.config.filter import FilterConfig
from mltfr_dist.routers import ROUTERS
from mltfr_dist.schema import Count, NonNegative, Probability, Section, known

TableContent = Literal["real", "random", "shuffled"]


class ExpertConfig(Section):
    """The cross-attention experts over the token tables."""

    per_table: Count = Field(
        1,
        description="Experts of each table: they share its filter, and adapt its rows each in its "
        "own way.",
    )
    num_heads: Count = Field(4, description="Attention heads of an expert.")
    head_dim: Count = Field(16, description="Size of one head.")
    dropout: Probability = Field(
        0.1, description="Dropout probability on attention weights and on the expert's output."
    )


class RouterConfig(Section):
    """The gate that mixes the experts."""

    name: Annotated[str, known(ROUTERS, "routers")] = Field(
        "softmax",
        description="; ".join(f"{name}: {entry.what}" for name, entry in ROUTERS.items()) + ".",
    )
    top_k: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description="Experts that a position is routed to, the best by gate; at least 2, for the "
        "weight of a single one carries "
        "no gradient; null: all. All experts are computed: it changes the mixture, not the cost.",
    )
    null_expert: bool = Field(
        False,
        description="A further gate that adds nothing, so that a position can do without experts.",
    )
    expert_dropout: Probability = Field(
        0.0,
        description="Probability that an expert is left out for the positions of a query, in "
        "training; never all.",
    )
    balance_weight: NonNegative = Field(
        0.01, description="Weight of the load-balancing term in the loss; 0 leaves the gate alone."
    )


class ConsensusConfig(Section):
    """The Fisher-weighted consensus expert, built between the two stages."""

    enabled: bool = Field(
        True, description="Whether there is a second stage with the consensus expert."
    )
    group: tuple[str, ...] = Field(
        (), description="Names of the tables whose experts are merged; none given: all."
    )
    weight: NonNegative = Field(
        0.1, description="lambda: weight of the consensus expert's output (start value if learned)."
    )
    learn_weight: bool = Field(False, description="Whether lambda is trained in stage 2.")
    fisher_sequences: Count = Field(
        1024,
        description="Training sequences over which the Fisher is averaged; more than there are: "
        "all.",
    )


class ItemTokensConfig(Section):
    """Token rows on the item side: an item's vector is its own embedding plus an adapted mixture of
    them.
    """

    source: Literal["none", "titles"] = Field(
        "none",
        description="Which tokens an item has. titles: those of its title, a positive control that "
        "reads item text and so "
        "stands outside the method's claim to need none.",
    )


class MLTFRConfig(Section):
    """Multi-LLM token filtering and routing."""

    enabled: bool = Field(True, description="False trains the bare backbone.")
    tables: tuple[Path, ...] = Field(
        (), description="Token tables written by `mltfr tables`, one expert each."
    )
    table_content: TableContent = Field(
        "real",
        description="real: the tables' rows. Controls of equal shape, made at load from "
        "training.seed: random: normal rows with "
        "the mean and covariance of the real ones; shuffled: each column permuted over the rows by "
        "itself.",
    )
    placement: Literal["auto", "rows", "mmap", "replicated", "zero3"] = Field(
        "auto",
        description="Where tables are held. rows: each rank holds V/N rows, found and fetched by "
        "an exact exchange; mmap: on the "
        "host, mapped from the file, one copy a node; replicated: each rank holds all; zero3: "
        "frozen parameters that ZeRO-3 "
        "gathers whole at each use (for comparison); auto: rows above one rank, replicated at one "
        "or where a whole table is "
        "needed. Changes no number.",
    )
    filter: FilterConfig = Field(FilterConfig(), description="The user-guided token filter.")
    item_tokens: ItemTokensConfig = Field(
        ItemTokensConfig(), description="Token rows on the item side."
    )
    expert: ExpertConfig = Field(ExpertConfig(), description="The experts.")
    router: RouterConfig = Field(RouterConfig(), description="The gate.")
    consensus: ConsensusConfig = Field(ConsensusConfig(), description="The consensus expert.")

    @model_validator(mode="after")
    def _routes(self) -> MLTFRConfig:
        gates = len(self.tables) * self.expert.per_table + self.router.null_expert
        if self.enabled and self.router.top_k is not None and self.router.top_k > gates:
            raise ValueError(
                f"router.top_k ({self.router.top_k}) must not exceed the number of gates ({gates})"
            )
        return self

    @model_validator(mode="after")
    def _has_tables(self) -> MLTFRConfig:
        if self.enabled and not self.tables:
            raise ValueError(
                "MLTFR needs at least one token table (mltfr.tables), or mltfr.enabled=false for "
                "the bare backbone"
            )
        return self
