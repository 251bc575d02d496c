"""A complete training run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mltfr_dist.backbones import BACKBONES
from mltfr_dist.baselines import BASELINES
from mltfr_dist.config.backbone import BackboneConfig
from mltfr_dist.config.data import DataConfig
from mltfr_dist.config.former import moved
from mltfr_dist.config.item_table import ItemTableConfig, check_items
from mltfr_dist.config.loss import LossConfig
from mltfr_dist.config.mltfr import MLTFRConfig
from mltfr_dist.config.published import PublishedConfig, check_published
from mltfr_dist.metrics import METRICS, metric_names
from mltfr_dist.optimizers import OPTIMIZERS
from mltfr_dist.schema import Count, NonNegative, Positive, Probability, Section, known, or_nearest
from mltfr_dist.selectors import SELECTORS


class OptimizerConfig(Section):
    """The optimizer and its schedule."""

    name: Annotated[str, known(OPTIMIZERS, "optimizers")] = Field(
        "adamw",
        description="; ".join(f"{name}: {entry.what}" for name, entry in OPTIMIZERS.items()) + ".",
    )
    learning_rate: Positive = Field(1e-3, description="Peak learning rate.")
    betas: tuple[Probability, Probability] = Field(
        (0.9, 0.98), description="adamw, adam: decay of the first and second moment."
    )
    momentum: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.9, description="sgd: share of the last step that is taken again."
    )
    weight_decay: NonNegative = Field(
        0.0,
        description="Weight decay of matrices (never of biases, norms, embeddings): adamw: "
        "decoupled; "
        "others: added to the gradient.",
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="Steps over which the learning rate rises from 0."
    )
    schedule: Literal["constant", "cosine"] = Field(
        "constant",
        description="After warm-up: constant, or cosine to 0 at the stage's last possible step.",
    )
    max_grad_norm: Positive | None = Field(
        None, description="Global gradient norm is clipped to this; null: no clipping."
    )
    item_gradients: Literal["dense", "sparse"] = Field(
        "dense",
        description="dense: an update moves, and exchanges the gradient of, every row of the item "
        "table; sparse: of the rows "
        "that its batch touches alone, by lazy Adam, for adam and adamw (other numbers than "
        "theirs). "
        "sparse needs a loss that samples items.",
    )


class TrainingConfig(Section):
    """How long, in which batches, with which numbers."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="Seed of initialisation, data order, dropout and negatives."
    )
    global_batch_size: Count = Field(256, description="Sequences per update over all ranks.")
    micro_batch_size: Count | None = Field(
        None,
        description="Sequences per forward-backward pass of a rank; null: global_batch_size / "
        "world_size.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="Numbers of the forward and backward pass."
    )
    epochs: Count = Field(
        20, description="Epochs at most of stage 1 (of the whole run for a bare backbone)."
    )
    consensus_epochs: Count = Field(
        10, description="Epochs at most of stage 2, with the consensus expert."
    )
    patience: Count = Field(
        5,
        description="Validations without a better evaluation.select_by after which a stage stops.",
    )
    log_every_steps: Count = Field(
        10, description="Steps between two lines of metrics.jsonl and TensorBoard points."
    )
    threads: Count | None = Field(
        None, description="CPU threads of a rank; null: cores / ranks of the node."
    )
    max_skipped_steps: Annotated[int, Field(ge=0)] = Field(
        10,
        description="Steps in a row that may be skipped because a loss or gradient is not finite; "
        "one more stops the run.",
    )
    hang_seconds: Positive = Field(
        1800.0,
        description="A rank without progress for so many seconds writes its stack traces and exits "
        "with code 3 "
        "(before the first step: at least 900 s).",
    )


class EvaluationConfig(Section):
    """Full ranking: every item is a candidate."""

    cutoffs: tuple[Count, ...] = Field(
        (5, 10, 20), description="K of HR@K, NDCG@K and all others; 10 must be among them."
    )
    batch_size: Count = Field(256, description="Targets ranked at a time.")
    select_by: str = Field(
        "NDCG@10",
        description="Metric that picks the checkpoint, at one of the cutoffs: "
        + "; ".join(
            f"{name}{'@K' * metric.at_cutoffs}: {metric.what}" for name, metric in METRICS.items()
        )
        + ".",
    )
    filter_seen: bool = Field(
        True, description="Items of the history are no candidates (targets always are)."
    )
    ties: Literal["pessimistic", "mean", "optimistic"] = Field(
        "pessimistic", description="Rank of a target among equal scores: last, middle, first."
    )
    every_epochs: Count = Field(1, description="Epochs between two validations.")

    @model_validator(mode="after")
    def _selects(self) -> EvaluationConfig:
        if 10 not in self.cutoffs:
            raise ValueError(
                "cutoffs must hold 10, for every report shows HR@10 and NDCG@10 "
                f"(given: {self.cutoffs})"
            )
        measured, (name, _, k) = metric_names(self.cutoffs), self.select_by.partition("@")
        if self.select_by in measured:
            return self
        if k.isdecimal() and name in METRICS and METRICS[name].at_cutoffs:
            raise ValueError(
                f"select_by {self.select_by} is at none of the cutoffs {self.cutoffs}: add it there"
            )
        raise ValueError(
            f"select_by {self.select_by} is not measured{or_nearest(self.select_by, measured)}; "
            f"metrics are {', '.join(measured)}"
        )


class CheckpointConfig(Section):
    """What is saved, and when."""

    every_steps: Count | None = Field(
        None, description="Steps between two checkpoints; null: one at the end of each epoch."
    )
    keep_last: Count = Field(2, description="Newest checkpoints that stay.")
    keep_best: Count = Field(
        1,
        description="Best validations of a stage whose weights stay; the first of them is the "
        "outcome.",
    )
    background: bool = Field(
        False,
        description="Whether training goes on while a checkpoint is written to the disk; each rank "
        "then holds a copy of what it writes in host memory.",
    )


class TrackingConfig(Section):
    """Where a run can be watched, beside metrics.jsonl."""

    also: tuple[Literal["wandb", "mlflow", "trackio"], ...] = Field(
        (),
        description="Services that get TensorBoard's numbers too; each needs its Python package.",
    )
    projector_items: Annotated[int, Field(ge=0)] = Field(
        10_000,
        description="Most popular items whose vectors TensorBoard's projector shows at the end of "
        "a run; 0: no projector.",
    )


class RunConfig(Section):
    """A complete training run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        "run",
        description="The run's folder under runs_dir (letters, digits, dot, dash, underscore).",
    )
    runs_dir: Path = Field(
        Path("runs"), description="Folder of all runs; `tensorboard --logdir` reads it."
    )
    data: DataConfig = Field(description="What is trained on.")
    backbone: BackboneConfig = Field(BackboneConfig(), description="The sequential recommender.")
    mltfr: MLTFRConfig = Field(description="Token filtering and routing.")
    item_table: ItemTableConfig = Field(
        ItemTableConfig(), description="Where the table of item vectors is held."
    )
    loss: LossConfig = Field(LossConfig(), description="The training loss.")
    published: PublishedConfig = Field(
        PublishedConfig(), description="Defects of the published method; all are off."
    )
    optimizer: OptimizerConfig = Field(
        OptimizerConfig(), description="The optimizer and its schedule."
    )
    training: TrainingConfig = Field(TrainingConfig(), description="Epochs, batches, precision.")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="Full ranking.")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="What is saved, and when.")
    tracking: TrackingConfig = Field(TrackingConfig(), description="Where a run can be watched.")
    baselines: tuple[Annotated[str, known([*BASELINES, "backbone"], "baselines")], ...] = Field(
        (),
        description="Compared in the report. backbone: the same run without MLTFR, with the epochs "
        "of both stages; "
        + "; ".join(f"{name}: {entry.what}" for name, entry in BASELINES.items())
        + ".",
    )
    deepspeed: Path | None = Field(
        None,
        description="DeepSpeed file: sharding and offload only. null: ds_configs/zero0.json in "
        "fp32 on one rank or with moments of the items below 512 MiB, otherwise zero1.json.",
    )

    @model_validator(mode="after")
    def _holds_items(self) -> RunConfig:
        gradients, loss = self.optimizer.item_gradients, self.loss.name
        check_items(self.item_table.placement, gradients, loss, self.optimizer.name)
        return self

    @model_validator(mode="after")
    def _has_what_is_defect(self) -> RunConfig:
        check_published(self)
        return self

    @model_validator(mode="after")
    def _trains_its_filter(self) -> RunConfig:
        chosen = self.mltfr.filter
        learns = chosen.strategy == "user_guided" and not self.published.straight_through
        if learns and chosen.top_k == 1:
            raise ValueError(
                "mltfr.filter.top_k must be at least 2: the weight of a single token carries no "
                "gradient (published.straight_through=true has that defect)"
            )
        return self

    @model_validator(mode="after")
    def _shows_no_future(self) -> RunConfig:
        if BACKBONES[self.backbone.name].reads_future and self.data.samples == "histories":
            raise ValueError(
                f"backbone.name {self.backbone.name} with data.samples histories, which scores "
                "every position, of which each would read the future: give data.samples prefixes, "
                "or the causal form of the backbone"
            )
        return self

    @model_validator(mode="after")
    def _places_tables(self) -> RunConfig:
        placement, reason = self.mltfr.placement, self.needs_whole_tables
        if self.mltfr.enabled and placement == "rows" and reason:
            raise ValueError(
                f"mltfr.placement rows divides tables, but {reason} needs whole ones: give auto, "
                "mmap or replicated"
            )
        if self.published.trained_tables and placement in ("mmap", "zero3"):
            raise ValueError(
                f"mltfr.placement {placement} holds frozen tables, but published.trained_tables is "
                "true: give auto or replicated"
            )
        return self

    @property
    def needs_whole_tables(self) -> str | None:
        """Why a rank needs all rows of a table at once; None where it does not."""
        content, chosen = self.mltfr.table_content, self.mltfr.filter
        if self.published.trained_tables:
            return "published.trained_tables=true"
        if content != "real":
            return f"mltfr.table_content={content} (made whole at load)"
        if SELECTORS[chosen.strategy].needs_whole_table:
            return f"mltfr.filter.strategy={chosen.strategy}"
        if self.published.straight_through and chosen.shortlist_size is None:
            return "published.straight_through=true over whole tables (shortlist_size=null)"
        return None

    @property
    def picks_on(self) -> Literal["valid", "test"]:
        """The split that picks the checkpoint."""
        return "test" if self.published.pick_on_test else "valid"

    @property
    def folder(self) -> Path:
        """The run's own folder."""
        return self.runs_dir / self.name

    @classmethod
    def moved(cls, fields: Mapping[str, Any]) -> list[str]:
        """What stands in the place of fields of older releases."""
        return moved(fields)
