"""What the published procedure does, what is done here instead, and the configuration field that switches each.

One entry a defect of docs/method.md. The default of every field is the repaired value; :func:`as_published` gives the
published form, and :func:`without` takes a single repair away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

from mltfr_dist.config import RunConfig
from mltfr_dist.errors import ConfigError
from mltfr_dist.schema import changed, or_nearest

Scope = Literal["method", "backbone", "protocol"]


def _has_mltfr(config: RunConfig) -> bool:
    return config.mltfr.enabled


def _filters(config: RunConfig) -> bool:
    return config.mltfr.enabled and config.mltfr.filter.strategy == "user_guided"


def _differs_by_user(config: RunConfig) -> bool:
    strategy = config.mltfr.filter.strategy
    return config.mltfr.enabled and strategy in ("user_guided", "random_tokens")


def _has_consensus(config: RunConfig) -> bool:
    return config.mltfr.enabled and config.mltfr.consensus.enabled


def _is_bert4rec(config: RunConfig) -> bool:
    return config.backbone.name == "bert4rec"


class Repair(NamedTuple):
    """One difference between the published procedure and this one."""

    defect: str
    """Its number in docs/method.md."""
    scope: Scope
    """method: MLTFR itself; backbone: the model it is added to; protocol: training and evaluation of any model."""
    published: dict[str, Any]
    """Dotted field to the published value."""
    applies: Callable[[RunConfig], bool]
    """Whether a run has what is repaired; in one that has not, the fields do nothing."""


REPAIRS: dict[str, Repair] = {
    "soft_weights": Repair(
        "D1",
        "method",
        {
            "mltfr.filter.weights": "straight_through",
            "mltfr.filter.top_k": 1,
            "mltfr.filter.filter_ratio": None,
        },
        _filters,
    ),
    "sharp_scores": Repair(
        "D2",
        "method",
        {
            "mltfr.filter.temperature": 0.5,
            "mltfr.filter.learn_temperature": False,
            "mltfr.filter.noise": 1.0,
        },
        _filters,
    ),
    "quiet_evaluation": Repair(
        "D3",
        "method",
        {"mltfr.filter.noise": 1.0, "mltfr.filter.noise_in_evaluation": True},
        _filters,
    ),
    "user_memory": Repair(
        "D4",
        "method",
        {"mltfr.filter.memory": "batch"},
        _differs_by_user,
    ),
    "causal_query": Repair(
        "D5",
        "method",
        {"mltfr.filter.query": "history"},
        _differs_by_user,
    ),
    "causal_filter": Repair(
        "D6",
        "backbone",
        {"backbone.filter_scope": "sequence"},
        lambda config: config.backbone.name in ("fmlp", "bsarec"),
    ),
    "frozen_tables": Repair(
        "D7",
        "method",
        {"mltfr.train_tables": True},
        _has_mltfr,
    ),
    "read_the_mask": Repair(
        "D8",
        "backbone",
        {"backbone.read_at": "before_mask"},
        _is_bert4rec,
    ),
    "masked_padding": Repair(
        "D9",
        "backbone",
        {"backbone.padding": "attended"},
        _is_bert4rec,
    ),
    "single_softmax": Repair(
        "D10",
        "method",
        {"mltfr.router.double_softmax": True},
        _has_mltfr,
    ),
    "going_on": Repair(
        "D10b",
        "method",
        {"mltfr.consensus.random_in_stage_one": True, "mltfr.consensus.fresh_start": True},
        _has_consensus,
    ),
    "per_sample_fisher": Repair(
        "D12",
        "method",
        {"mltfr.consensus.fisher": "batch_mean"},
        _has_consensus,
    ),
    "normalised_fisher": Repair(
        "D13",
        "method",
        {"mltfr.consensus.normalise_fisher": False},
        _has_consensus,
    ),
    "shared_core": Repair(
        "D14",
        "method",
        {"mltfr.expert.form": "paper"},
        _has_mltfr,
    ),
    "validation_picks": Repair(
        "D17",
        "protocol",
        {"evaluation.select_on": "test"},
        lambda config: True,
    ),
    "unseen_negatives": Repair(
        "D18",
        "protocol",
        {"loss.negatives": "outside_inputs"},
        lambda config: config.loss.name in ("bce", "gbce"),
    ),
}
"""Every repair by name."""

ALSO_PUBLISHED: dict[Scope, dict[str, Any]] = {
    "method": {
        "mltfr.router.balance_weight": 0.0,
        "mltfr.filter.shortlist_size": None,
        "mltfr.consensus.dropout": False,
        "mltfr.consensus.fisher_at": "last",
        "mltfr.consensus.fisher_sequences": 1 << 62,
    },
    "protocol": {
        "data.train_on": "train_and_valid",
        "evaluation.select_by": "HR@20",
        "evaluation.filter_seen": False,
    },
}
"""What else the authors set, each a choice and no defect of MLTFR."""


def as_published(
    config: RunConfig, *, scopes: Iterable[Scope] = ("method", "backbone", "protocol")
) -> RunConfig:
    """``config`` with every repair of ``scopes`` taken away.

    The gate has one softmax, as in the published SASRec variant; `router.double_softmax` is that of the others. The
    published consensus merges tables of one width: give them in `mltfr.consensus.group`.
    """
    fields: dict[str, Any] = {}
    for scope in set(scopes):
        fields |= ALSO_PUBLISHED.get(scope, {})
    for name, repair in REPAIRS.items():
        if repair.scope in set(scopes) and name != "single_softmax":
            fields |= repair.published
    return changed(config, fields, source="the published form")


def without(config: RunConfig, name: str) -> RunConfig:
    """``config`` with one repair taken away.

    Raises:
        ConfigError: No repair has that name; the nearest is named.
    """
    if name not in REPAIRS:
        raise ConfigError(
            f"There is no repair `{name}`{or_nearest(name, list(REPAIRS))}.",
            remedy=f"Repairs: {', '.join(REPAIRS)}.",
        )
    return changed(config, REPAIRS[name].published, source=f"the variant without {name}")


def taken_away(config: RunConfig) -> list[str]:
    """Names of the repairs that ``config`` does without, of those that apply to it."""

    def value(path: str) -> Any:
        place: Any = config
        for name in path.split("."):
            place = getattr(place, name)
        return place

    return [
        name
        for name, repair in REPAIRS.items()
        if repair.applies(config)
        and all(value(path) == wanted for path, wanted in repair.published.items())
    ]
