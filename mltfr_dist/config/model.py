"""The backbone, MLTFR on it, and the loss.

Shapes: D hidden size, V_m rows and D_m columns of token table m, K kept tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mltfr_dist.backbones import BACKBONES
from mltfr_dist.losses import LOSSES
from mltfr_dist.routers import ROUTERS
from mltfr_dist.schema import (
    Count,
    Fraction,
    NonNegative,
    Positive,
    Probability,
    Section,
    known,
)
from mltfr_dist.selectors import SELECTORS

TableContent = Literal["real", "random", "shuffled"]


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
    mask_ratio: Fraction = Field(
        0.2,
        description="bert4rec: share of positions that are masked and predicted; cl4srec: share masked in a masked view.",
    )
    crop_ratio: Fraction = Field(
        0.6, description="cl4srec: share of the history that a cropped view keeps."
    )
    reorder_ratio: Fraction = Field(
        0.6, description="cl4srec: share of the history that a reordered view shuffles."
    )
    low_frequencies: Count = Field(
        3,
        description="bsarec: Fourier components from 0 on that count as low; for 3 the released "
        "code's c is 5.",
    )
    inductive_bias: Annotated[float, Field(ge=0, le=1)] = Field(
        0.7,
        description="bsarec: alpha, weight of the frequency filter; self-attention has the rest.",
    )
    filter_scope: Literal["prefix", "sequence", "padded"] = Field(
        "prefix",
        description="fmlp, bsarec: the frequency filter of a position mixes its past (causal), or "
        "the whole sequence, future included (MLTFR's authors). padded (linrec too): the model as "
        "its own authors' code has it, over the whole sequence padded to max_len; needs "
        "data.samples=prefixes.",
    )
    padding: Literal["masked", "attended"] = Field(
        "masked",
        description="bert4rec: padding is no position at all, or acts as an item up to max_len (published).",
    )
    read_at: Literal["mask", "before_mask"] = Field(
        "mask",
        description="bert4rec: where a next item is scored; before_mask: as published for histories below max_len.",
    )

    @model_validator(mode="after")
    def _has_a_padded_form(self) -> BackboneConfig:
        if self.filter_scope == "padded" and self.name not in ("fmlp", "bsarec", "linrec"):
            raise ValueError(
                "filter_scope padded is the published form of fmlp, bsarec and linrec, and name is "
                f"{self.name}: give one of them, or filter_scope prefix"
            )
        return self

    @model_validator(mode="after")
    def _heads_divide(self) -> BackboneConfig:
        if self.hidden_dim % self.num_heads:
            raise ValueError(
                f"num_heads ({self.num_heads}) must divide hidden_dim ({self.hidden_dim})"
            )
        return self


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
        description="direct and seed_words: rows of a table that every position may attend to; more are refused.",
    )
    query: Literal["prefix", "history"] = Field(
        "prefix",
        description="prefix: the mean of a position's past (causal); history: of all items, future ones too (published).",
    )
    weights: Literal["soft", "straight_through"] = Field(
        "soft",
        description="soft: the kept scores' log-softmax joins the attention logits; straight_through: rows are multiplied by "
        "normalised weights of value 1 / top_k (published; with top_k=1 no gradient reaches the filter).",
    )
    memory: Literal["user", "batch"] = Field(
        "user",
        description="user: a query's expert reads what it keeps; batch: what any query of the batch keeps (published).",
    )
    noise: NonNegative = Field(
        0.0,
        description="Scale of Gumbel noise on the cosines, keyed by (seed, step, user, table); 1 as published.",
    )
    noise_steps: Count | None = Field(
        None,
        description="Steps over which the noise falls linearly to none; null: it stays (published).",
    )
    noise_in_evaluation: bool = Field(
        False, description="Whether noise is drawn outside training too (published)."
    )
    top_k: Count | None = Field(
        16,
        description="Tokens kept per table and query; with soft weights at least 2, for that of a single one carries no "
        "gradient. Give this or filter_ratio.",
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
        description="Positions that share one query, taken at the first of them, so that it stays causal. 1: a query a position.",
    )
    shortlist_size: Count | None = Field(
        2048,
        description="Rows per table that are searched exactly: those nearest to any query of a recent global batch. "
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
                f"give exactly one of top_k and filter_ratio, and null for the other (given: {given})"
            )
        if self.weights == "soft" and self.top_k == 1:
            raise ValueError(
                "top_k must be at least 2 with soft weights: the weight of a single token carries no gradient"
            )
        if not self.noise and (self.noise_steps or self.noise_in_evaluation):
            raise ValueError(
                "noise_steps and noise_in_evaluation say when there is noise: give noise above 0 too"
            )
        if self.top_k and self.shortlist_size and self.top_k > self.shortlist_size:
            raise ValueError(
                f"top_k ({self.top_k}) must not exceed shortlist_size ({self.shortlist_size})"
            )
        if bool(self.seed_words) != (self.strategy == "seed_words"):
            raise ValueError(
                f"seed_words {list(self.seed_words)} and strategy {self.strategy}: give both words and strategy, or none"
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


class ExpertConfig(Section):
    """The cross-attention experts over the token tables."""

    per_table: Count = Field(
        1,
        description="Experts of each table: they share its filter, and adapt its rows each in its own way.",
    )
    form: Literal["core", "paper"] = Field(
        "core",
        description="core: an adapter per expert and a core of one shape for all, started equal, so that any can be merged; "
        "paper: each reads its table's rows itself and starts by itself, so that only tables of equal width can be merged.",
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
        description="Experts that a position is routed to, the best by gate; at least 2, for the weight of a single one carries "
        "no gradient; null: all. All experts are computed: it changes the mixture, not the cost.",
    )
    null_expert: bool = Field(
        False,
        description="A further gate that adds nothing, so that a position can do without experts.",
    )
    expert_dropout: Probability = Field(
        0.0,
        description="Probability that an expert is left out for the positions of a query, in training; never all.",
    )
    double_softmax: bool = Field(
        False, description="Softmax applied twice to a dense gate (published in some variants)."
    )
    balance_weight: NonNegative = Field(
        0.01, description="Weight of the load-balancing term in the loss; 0 leaves the gate alone."
    )

    @model_validator(mode="after")
    def _published_gate_is_dense(self) -> RouterConfig:
        if self.double_softmax and self.name != "softmax":
            raise ValueError(
                f"double_softmax is a second softmax after name softmax, and name is {self.name}: leave one out"
            )
        if self.double_softmax and (self.top_k is not None or self.expert_dropout):
            raise ValueError(
                "double_softmax needs a dense gate: a second softmax gives weight to what top_k or expert_dropout left out"
            )
        return self


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
    dropout: bool = Field(
        True,
        description="Whether the consensus expert has the experts' dropout in training (published: "
        "it has none).",
    )
    fisher_at: Literal["best", "last"] = Field(
        "best",
        description="Weights of stage 1 whose experts are merged: its best validation's, or its "
        "last epoch's (published).",
    )
    fisher: Literal["per_sample", "batch_mean"] = Field(
        "per_sample",
        description="per_sample: mean of the squared gradients of single sequences; batch_mean: of the mean loss of global "
        "batches (published; it shrinks as the batch grows).",
    )
    normalise_fisher: bool = Field(
        True,
        description="Divide each expert's Fisher by its mean, and take the plain mean where no expert has any; false: add 1e-12 "
        "to the sum (published).",
    )
    random_in_stage_one: bool = Field(
        False,
        description="Stage 1 adds lambda times a frozen, randomly initialised consensus expert (published).",
    )
    fisher_sequences: Count = Field(
        1024,
        description="Training sequences over which the Fisher is averaged; more than there are: "
        "all (published).",
    )
    fresh_start: bool = Field(
        False,
        description="Stage 2 starts from a new initialisation (as published) and not from stage 1's best weights.",
    )


class ItemTokensConfig(Section):
    """Token rows on the item side: an item's vector is its own embedding plus an adapted mixture of them."""

    source: Literal["none", "titles"] = Field(
        "none",
        description="Which tokens an item has. titles: those of its title, a positive control that reads item text and so "
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
        description="real: the tables' rows. Controls of equal shape, made at load from training.seed: random: normal rows with "
        "the mean and covariance of the real ones; shuffled: each column permuted over the rows by itself.",
    )
    placement: Literal["auto", "rows", "mmap", "replicated", "zero3"] = Field(
        "auto",
        description="Where tables are held. rows: each rank holds V/N rows, found and fetched by an exact exchange; mmap: on the "
        "host, mapped from the file, one copy a node; replicated: each rank holds all; zero3: frozen parameters that ZeRO-3 "
        "gathers whole at each use (for comparison); auto: rows above one rank, replicated at one or where a whole table is "
        "needed. Changes no number.",
    )
    filter: FilterConfig = Field(FilterConfig(), description="The user-guided token filter.")
    train_tables: bool = Field(
        False, description="Tables are trained parameters (published, though called frozen)."
    )
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

    @property
    def needs_whole_tables(self) -> str | None:
        """Why a rank needs all rows of a table at once; None where it does not."""
        if self.train_tables:
            return "mltfr.train_tables=true"
        if self.table_content != "real":
            return f"mltfr.table_content={self.table_content} (made whole at load)"
        if SELECTORS[self.filter.strategy].needs_whole_table:
            return f"mltfr.filter.strategy={self.filter.strategy}"
        if self.filter.weights == "straight_through" and self.filter.shortlist_size is None:
            return "mltfr.filter.weights=straight_through over whole tables (shortlist_size=null)"
        return None

    @model_validator(mode="after")
    def _places(self) -> MLTFRConfig:
        reason = self.needs_whole_tables
        if self.enabled and self.placement == "rows" and reason:
            raise ValueError(
                f"placement rows divides tables, but {reason} needs whole ones: give auto, mmap or replicated"
            )
        if self.enabled and self.train_tables and self.placement in ("mmap", "zero3"):
            raise ValueError(
                f"placement {self.placement} holds frozen tables, but train_tables is true: give auto or replicated"
            )
        return self

    @model_validator(mode="after")
    def _has_tables(self) -> MLTFRConfig:
        if self.enabled and not self.tables:
            raise ValueError(
                "MLTFR needs at least one token table (mltfr.tables), or mltfr.enabled=false for the bare backbone"
            )
        return self


class LossConfig(Section):
    """The training loss, over real positions only."""

    name: Annotated[str, known(LOSSES, "losses")] = Field(
        "cross_entropy",
        description="; ".join(f"{name}: {entry.what}" for name, entry in LOSSES.items()) + ".",
    )
    num_negatives: Count = Field(
        1,
        description="bce, gbce: negatives per position; "
        "sampled_softmax: items drawn per update, shared by its positions (256 is usual).",
    )
    negatives: Literal["unseen", "outside_inputs"] = Field(
        "unseen",
        description="bce, gbce: unseen: outside the user's whole history; outside_inputs: outside "
        "the sample's inputs and without replacement, so that only the last target can be among "
        "them (published).",
    )
    proposal: Literal["uniform", "log_uniform"] = Field(
        "uniform",
        description="sampled_softmax: items are drawn evenly, or near Zipf's law by their rank in popularity.",
    )
    calibration: Annotated[float, Field(ge=0, le=1)] = Field(
        0.75, description="gbce: t; 0 is bce, 1 gives calibrated probabilities, less overconfident."
    )
    contrast_weight: NonNegative = Field(
        0.1, description="cl4srec: weight of the contrastive term, per sequence."
    )
    contrast_temperature: Positive = Field(
        1.0, description="cl4srec: products of two views are divided by it."
    )
    contrast_group: Annotated[int, Field(ge=2)] = Field(
        16,
        description="cl4srec: sequences whose views are each other's negatives; divides the micro-batch of a rank.",
    )
