"""A sweep as a typed file: what is searched, how, with which resources. `tuning/spaces/*.yaml` are
ready-made.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from mltfr_dist.config import RunConfig
from mltfr_dist.schema import Count, NonNegative, Positive, Section, field_at, nested, validate
from mltfr_dist.training.run_folder import leaf_values
from mltfr_dist.tuning.domain import Domain

Values = dict[str, Any]
"""Dotted key of a configuration to a value."""

CHANGEABLE = (
    "optimizer.",
    "backbone.cl4srec.contrast_weight",
    "mltfr.router.balance_weight",
    "mltfr.consensus.weight",
)
CHANGEABLE_LEAVES = ("dropout", "noise", "expert_dropout")
"""What PBT may change between two epochs: nothing that gives weights another shape or meaning."""


class AshaConfig(Section):
    """Asynchronous successive halving (Li et al. 2020, arXiv 1810.05934)."""

    grace_epochs: Count = Field(2, description="Epochs that every trial gets.")
    reduction_factor: Annotated[float, Field(gt=1)] = Field(
        3, description="One of so many trials goes on at each rung."
    )


class PbtConfig(Section):
    """Population-based training (Jaderberg et al. 2017, arXiv 1711.09846); num_trials is the
    population.
    """

    every_epochs: Count = Field(2, description="Epochs between two exchanges.")
    quantile: Annotated[float, Field(gt=0, le=0.5)] = Field(
        0.25,
        description="Share of the population that takes over weights and values from an equal "
        "share at the top.",
    )


class TrialResources(Section):
    """What one trial holds while it runs."""

    workers: Count = Field(
        1, description="Ranks of a trial, by Ray Train; they share the trial's global batch."
    )
    cpus: Positive = Field(1, description="CPU cores of a worker.")
    gpus: NonNegative = Field(
        0,
        description="GPUs of a worker; a fraction lets several trials share one (one worker each).",
    )

    @model_validator(mode="after")
    def _shares(self) -> TrialResources:
        if self.workers > 1 and self.gpus % 1:
            raise ValueError(
                f"workers {self.workers} with gpus {self.gpus}: two ranks of a run cannot share a "
                f"GPU under NCCL"
            )
        return self


class SweepConfig(Section):
    """A sweep."""

    listed_by: ClassVar[str] = "sweep"

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        description="The sweep's folder under sweeps_dir."
    )
    sweeps_dir: Path = Field(Path("runs/sweeps"), description="Folder of all sweeps.")
    preset: str | None = Field(None, description="Complete configuration that a trial starts from.")
    config: Path | None = Field(None, description="YAML file; its keys go over the preset's.")
    overrides: dict[str, Any] = Field(
        {}, description="Dotted keys over both: the same in every trial."
    )
    search: dict[str, Domain] = Field(description="Dotted key of a configuration to its values.")
    algorithm: Literal["random", "grid", "tpe"] = Field(
        "random",
        description="random; grid: every combination; tpe: Optuna's Tree-structured Parzen "
        "Estimator.",
    )
    num_trials: Count | None = Field(None, description="Trials; null: the whole grid.")
    include_base: bool = Field(
        True, description="The first trial is the base itself, where its values lie in the space."
    )
    scheduler: Literal["asha", "pbt", "none"] = Field(
        "asha", description="Which trials are stopped early, or changed as they go."
    )
    asha: AshaConfig = Field(AshaConfig(), description="Early stopping.")
    pbt: PbtConfig = Field(PbtConfig(), description="Population-based training.")
    metric: str = Field(
        "valid/NDCG@10", description="What is maximised: the best validation of a trial."
    )
    seed: Annotated[int, Field(ge=0)] = Field(
        0, description="Seed of the search (training.seed is the trials')."
    )
    resources_per_trial: TrialResources = Field(
        TrialResources(), description="What one trial holds."
    )
    max_concurrent: Count | None = Field(
        None, description="Trials at a time; null: as many as the cluster holds."
    )
    max_failures: Annotated[int, Field(ge=0)] = Field(
        1,
        description="Times that a trial which fails is started again, from its last checkpoint; "
        "then it stays failed.",
    )
    final_seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        (0, 1, 2),
        description="training.seed of the runs of the chosen configuration, which alone read the "
        "test split.",
    )

    @property
    def folder(self) -> Path:
        """The sweep's own folder."""
        return self.sweeps_dir / self.name

    @property
    def metric_name(self) -> str:
        """The metric without its split."""
        return self.metric.removeprefix("valid/")

    @model_validator(mode="after")
    def _can_be_counted(self) -> SweepConfig:
        endless = [key for key, domain in self.search.items() if domain.options() is None]
        if not self.search:
            raise ValueError("search names no field")
        if self.algorithm == "grid" and endless:
            raise ValueError(
                f"a grid has no ranges of real numbers (given for {', '.join(endless)})"
            )
        if self.algorithm == "grid" and self.num_trials is not None:
            raise ValueError(
                f"a grid has as many trials as combinations: leave num_trials out (given: "
                f"{self.num_trials})"
            )
        if self.algorithm != "grid" and self.num_trials is None:
            raise ValueError(f"give num_trials: {self.algorithm} search has no end of its own")
        above: list[str] = []
        for key, domain in self.search.items():
            if unknown := [name for name in domain.when if name not in above]:
                raise ValueError(
                    f"search.{key}.when names {', '.join(unknown)}, which is not searched above it"
                )
            above.append(key)
        if self.scheduler == "pbt" and (
            fixed := [key for key in self.search if not can_change(key)]
        ):
            raise ValueError(
                f"pbt changes fields while weights are kept, which {', '.join(fixed)} cannot be"
            )
        return self


def can_change(key: str) -> bool:
    """Whether a field may change in the middle of a run."""
    return key.startswith(CHANGEABLE) or key.rpartition(".")[2] in CHANGEABLE_LEAVES


def encoded(value: Any) -> str:
    """A value as text, for Optuna's categories and for messages."""
    return json.dumps(value, sort_keys=True)


def shown(values: Mapping[str, Any]) -> str:
    """Values on one line."""
    return "  ".join(f"{short(key)}={shown_value(value)}" for key, value in values.items())


def short(key: str) -> str:
    """A field by its own name and its section's."""
    return ".".join(key.split(".")[-2:])


def shown_value(value: Any) -> str:
    """A value as short as it can be, and otherwise as YAML has it: files by their names."""
    if isinstance(value, list | tuple):
        return "+".join(Path(str(one)).name for one in value) or "none"
    if value is None or isinstance(value, bool):
        return encoded(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def with_values(base: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The configuration of one trial.

    Raises:
        ConfigError: The values do not go together.
    """
    return validate(
        RunConfig,
        nested({**leaf_values(base), **values}),
        source=", ".join(f"{key}={encoded(v)}" for key, v in values.items()),
    )


def base_values(sweep: SweepConfig, base: RunConfig) -> Values | None:
    """The base's own point of the space; None where it lies outside."""
    leaves = leaf_values(base)
    values = {key: leaves[key] for key in sweep.search}
    inside = all(
        domain.holds(values[key]) or not domain.applies(values)
        for key, domain in sweep.search.items()
    )
    return values if inside else None


def typed_choices(sweep: SweepConfig) -> SweepConfig:
    """The sweep with its choices, and the values in `when`, as their fields hold them: the text
    "0.001" of a rate becomes a number.

    What is no value of its field stays as it is, for the check of the space to refuse.
    """
    typed = {key for key, domain in sweep.search.items() if domain.choices}

    def wanted(above: str, values: Any) -> Any:
        if above not in typed:
            return values
        many = isinstance(values, list)
        return [_typed(above, value) for value in values] if many else _typed(above, values)

    search = {}
    for key, domain in sweep.search.items():
        changes: Values = {
            "choices": tuple(_typed(key, value) for value in domain.choices),
            "when": {above: wanted(above, values) for above, values in domain.when.items()},
        }
        search[key] = domain.model_copy(update=changes)
    return sweep.model_copy(update={"search": search})


def _typed(key: str, value: Any) -> Any:
    field = field_at(RunConfig, key)
    if field is None:
        return value
    described: Any = Annotated[field.annotation, field]
    adapter: TypeAdapter[Any] = TypeAdapter(described)
    try:
        return adapter.dump_python(adapter.validate_python(value), mode="json")
    except ValidationError:
        return value
