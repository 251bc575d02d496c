"""Which rows of a token table an expert reads."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from mltfr_dist.schema import Count, Fraction, NonNegative, Positive, Section, known
from mltfr_dist.selectors import SELECTORS


class FilterConfig(Section):
    """Which rows of a token table an expert reads."""

    strategy: Annotated[str, known(SELECTORS, "strategies")] = Field(
        "user_guided",
        description="; ".join(f"{name}: {entry.what}" for name, entry in SELECTORS.items()) + ".",
    )
    num_prototypes: Count = Field(50, description="learned_prototypes: rows made of each table.")
    seed_words: tuple[str, ...] = Field(
        (), description="seed_words: the words; case does not count."
    )
    seed_neighbours: Annotated[int, Field(ge=0)] = Field(
        10, description="seed_words: rows of highest cosine that join each word's own."
    )
    max_direct_rows: Count = Field(
        1024,
        description="direct and seed_words: rows of a table that every position may attend to; "
        "more are refused.",
    )
    noise: NonNegative = Field(
        0.0,
        description="Scale of Gumbel noise on the cosines in training, keyed by (seed, step, user, "
        "table).",
    )
    noise_steps: Count | None = Field(
        None, description="Steps over which the noise falls linearly to none; null: it stays."
    )
    top_k: Count | None = Field(
        16,
        description="Tokens kept per table and query; at least 2 where the filter is trained, for "
        "the weight "
        "of a single one carries no gradient. Give this or filter_ratio.",
    )
    filter_ratio: Fraction | None = Field(
        None, description="Share of a table's vocabulary kept per query. Give this or top_k."
    )
    temperature: Positive = Field(
        0.05, description="tau_s: cosine scores are divided by it (start value if learned)."
    )
    learn_temperature: bool = Field(True, description="Whether tau_s is trained.")
    query_every: Count = Field(
        4,
        description="Positions that share one query, taken at the first of them, so that it stays "
        "causal. 1: a query a position.",
    )
    shortlist_size: Count | None = Field(
        2048,
        description="Rows per table that are searched exactly: those nearest to any query of a "
        "recent global batch. "
        "null: search the whole vocabulary at every query.",
    )
    shortlist_refresh_steps: Count = Field(
        50, description="Steps between two refreshes of the shortlist."
    )

    @model_validator(mode="after")
    def _one_size(self) -> FilterConfig:
        if (self.top_k is None) == (self.filter_ratio is None):
            given = f"top_k {self.top_k}, filter_ratio {self.filter_ratio}"
            raise ValueError(
                f"give exactly one of top_k and filter_ratio, and null for the other (given: "
                f"{given})"
            )
        if not self.noise and self.noise_steps:
            raise ValueError("noise_steps says when there is noise: give noise above 0 too")
        if self.top_k and self.shortlist_size and self.top_k > self.shortlist_size:
            raise ValueError(
                f"top_k ({self.top_k}) must not exceed shortlist_size ({self.shortlist_size})"
            )
        if bool(self.seed_words) != (self.strategy == "seed_words"):
            raise ValueError(
                f"seed_words {list(self.seed_words)} and strategy {self.strategy}: give both words "
                f"and strategy, or none"
            )
        return self

    def num_kept(self, num_rows: int) -> int:
        """K for a table of ``num_rows`` tokens."""
        if self.top_k is not None:
            return self.top_k
        assert self.filter_ratio is not None
        return max(2, round(self.filter_ratio * num_rows))

    def noise_scale(self, step: int) -> float:
        """Scale of the noise after ``step`` updates of the run."""
        return (
            self.noise * max(0.0, 1 - step / self.noise_steps) if self.noise_steps else self.noise
        )
