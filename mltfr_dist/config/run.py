"""A complete training run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mltfr_dist.config.model import BackboneConfig, LossConfig, MLTFRConfig
from mltfr_dist.losses import LOSSES
from mltfr_dist.metrics import METRICS, metric_names
from mltfr_dist.optimizers import OPTIMIZERS
from mltfr_dist.schema import Count, NonNegative, Positive, Probability, Section, known, or_nearest


class DataConfig(Section):
    """What is trained on."""

    path: Path = Field(description="Folder written by `mltfr prepare` (it holds manifest.json).")
    max_len: Count = Field(
        50, description="Items of a history that the model sees, the most recent ones."
    )
    shuffle_shards: Count = Field(
        8,
        description="Shards whose sequences are shuffled together; the order of shards is shuffled too.",
    )
    train_on: Literal["train", "train_and_valid"] = Field(
        "train",
        description="train: what lies before the validation targets; train_and_valid: each user's "
        "validation target too (published; needs evaluation.select_on=test, for nothing is left to "
        "validate on).",
    )
    long_histories: Literal["truncate", "windows"] = Field(
        "truncate",
        description="Training histories longer than max_len. truncate: only their most recent items; "
        "windows: cut into pieces of max_len positions, each a sample of its own, so that every item is a target.",
    )
    samples: Literal["histories", "prefixes"] = Field(
        "histories",
        description="histories: one sample a history, scored at every position; prefixes: one a "
        "target, the up to max_len items before it, scored at its last position alone (as "
        "FMLP-Rec, BSARec and LinRec train). Samples are what a batch counts.",
    )
    length_pool: Count = Field(
        1,
        description="Global batches whose samples are sorted by length together, so that a batch holds histories of like "
        "length; the order of the batches is shuffled. 1: batches as they are drawn.",
    )
    last_batch: Literal["pad", "drop"] = Field(
        "pad",
        description="The last batch of an epoch where it is not full. pad: filled with rows of weight zero; "
        "drop: left out (other samples each epoch).",
    )
    num_workers: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Processes of a rank that make batches ahead of training; 0: made in turn by the rank itself.",
    )
    on_bad_shard: Literal["stop", "quarantine"] = Field(
        "stop",
        description="A shard that is missing or damaged. stop: an error; quarantine: every rank reads all shards when the run "
        "starts, and what any rank finds bad goes to left_out.",
    )
    left_out: tuple[str, ...] = Field(
        (),
        description="Shard files that are not read, of any split. Part of the run: it goes on only without the same ones.",
    )
    read_attempts: Count = Field(
        4,
        description="Times that a shard is read, 0.5 s, 1 s, 2 s, ... apart, before it is given up.",
    )
    read_timeout: Positive = Field(
        300.0, description="Seconds after which one attempt to read a shard has failed."
    )


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
        description="Weight decay of matrices (never of biases, norms, embeddings): adamw: decoupled; "
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
        description="dense: an update moves, and exchanges the gradient of, every row of the item table; sparse: of the rows "
        "that its batch touches alone, by lazy Adam, for adam and adamw (other numbers than theirs). "
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
        description="Sequences per forward-backward pass of a rank; null: global_batch_size / world_size.",
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
        description="Steps in a row that may be skipped because a loss or gradient is not finite; one more stops the run.",
    )
    hang_seconds: Positive = Field(
        1800.0,
        description="A rank without progress for so many seconds writes its stack traces and exits with code 3 "
        "(before the first step: at least 900 s).",
    )


class EvaluationConfig(Section):
    """Full ranking: every item is a candidate."""

    cutoffs: tuple[Count, ...] = Field(
        (5, 10, 20), description="K of HR@K and NDCG@K; 10 must be among them."
    )
    batch_size: Count = Field(256, description="Users ranked at a time.")
    select_on: Literal["valid", "test"] = Field(
        "valid",
        description="Split that picks the checkpoint; test (published) makes the figures too high.",
    )
    select_by: str = Field(
        "NDCG@10",
        description="Metric that picks the checkpoint, at one of the cutoffs: "
        + "; ".join(
            f"{name}{'@K' * metric.at_cutoffs}: {metric.what}" for name, metric in METRICS.items()
        )
        + ".",
    )
    filter_seen: bool = Field(
        True, description="Items of the history are no candidates (the target always is)."
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
        description="Best validations of a stage whose weights stay; the first of them is the outcome.",
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
    loss: LossConfig = Field(LossConfig(), description="The training loss.")
    optimizer: OptimizerConfig = Field(
        OptimizerConfig(), description="The optimizer and its schedule."
    )
    training: TrainingConfig = Field(TrainingConfig(), description="Epochs, batches, precision.")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="Full ranking.")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="What is saved, and when.")
    tracking: TrackingConfig = Field(TrackingConfig(), description="Where a run can be watched.")
    baselines: tuple[Literal["popularity", "item_knn", "backbone"], ...] = Field(
        (),
        description="Compared in the report. backbone: the same run without MLTFR, with the epochs of both stages.",
    )
    deepspeed: Path = Field(
        Path("ds_configs/zero1.json"), description="DeepSpeed file: sharding and offload only."
    )

    @model_validator(mode="after")
    def _touches_few_items(self) -> RunConfig:
        loss = self.loss.name
        if self.optimizer.item_gradients == "sparse" and LOSSES[loss].negatives == "none":
            *others, last = (name for name, entry in LOSSES.items() if entry.negatives != "none")
            raise ValueError(
                f"optimizer.item_gradients sparse with loss.name {loss}, which scores every item, so that every row has a "
                f"gradient: give loss.name {', '.join(others)} or {last}, or item_gradients dense"
            )
        return self

    @model_validator(mode="after")
    def _steps_rows(self) -> RunConfig:
        name = self.optimizer.name
        if self.optimizer.item_gradients == "sparse" and not OPTIMIZERS[name].by_rows:
            serves = " or ".join(name for name, entry in OPTIMIZERS.items() if entry.by_rows)
            raise ValueError(
                f"optimizer.item_gradients sparse steps rows by lazy Adam, and optimizer.name is {name}: "
                f"give optimizer.name {serves}, or item_gradients dense"
            )
        return self

    @model_validator(mode="after")
    def _keeps_what_selects_unseen(self) -> RunConfig:
        if self.data.train_on == "train_and_valid" and self.evaluation.select_on == "valid":
            raise ValueError(
                "data.train_on train_and_valid trains on the validation targets, and "
                "evaluation.select_on valid picks the checkpoint by them: give data.train_on train "
                "or evaluation.select_on test"
            )
        return self

    @model_validator(mode="after")
    def _shows_no_future(self) -> RunConfig:
        if self.backbone.filter_scope == "padded" and self.data.samples == "histories":
            raise ValueError(
                "backbone.filter_scope padded with data.samples histories, which scores every "
                "position, of which each would read the future: give data.samples prefixes, or "
                "filter_scope prefix"
            )
        return self

    @property
    def folder(self) -> Path:
        """The run's own folder."""
        return self.runs_dir / self.name
