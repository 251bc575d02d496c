"""What the published procedure does, what is done here instead, and the configuration field that switches each.

One entry a defect of docs/method.md. The default of every field is the repaired value; :func:`as_published` gives the
published form, and :func:`without` takes a single repair away.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from mltfr_dist.config import RunConfig
from mltfr_dist.errors import ConfigError
from mltfr_dist.schema import nearest_key, validate

Scope = Literal["method", "backbone", "protocol"]


class Repair(NamedTuple):
    """One difference between the published procedure and this one."""

    defect: str
    """Its number in docs/method.md."""
    scope: Scope
    """method: MLTFR itself; backbone: the model it is added to; protocol: training and evaluation of any model."""
    published: dict[str, Any]
    """Dotted field to the published value."""


REPAIRS: dict[str, Repair] = {
    "soft_weights": Repair(
        "D1",
        "method",
        {
            "mltfr.filter.weights": "straight_through",
            "mltfr.filter.top_k": 1,
            "mltfr.filter.filter_ratio": None,
        },
    ),
    "sharp_scores": Repair(
        "D2",
        "method",
        {
            "mltfr.filter.temperature": 0.5,
            "mltfr.filter.learn_temperature": False,
            "mltfr.filter.noise": 1.0,
        },
    ),
    "quiet_evaluation": Repair(
        "D3", "method", {"mltfr.filter.noise": 1.0, "mltfr.filter.noise_in_evaluation": True}
    ),
    "user_memory": Repair("D4", "method", {"mltfr.filter.memory": "batch"}),
    "causal_query": Repair("D5", "method", {"mltfr.filter.query": "history"}),
    "causal_filter": Repair("D6", "backbone", {"backbone.filter_scope": "sequence"}),
    "frozen_tables": Repair("D7", "method", {"mltfr.train_tables": True}),
    "read_the_mask": Repair("D8", "backbone", {"backbone.read_at": "before_mask"}),
    "masked_padding": Repair("D9", "backbone", {"backbone.padding": "attended"}),
    "single_softmax": Repair("D10", "method", {"mltfr.router.double_softmax": True}),
    "going_on": Repair(
        "D10b",
        "method",
        {"mltfr.consensus.random_in_stage_one": True, "mltfr.consensus.fresh_start": True},
    ),
    "per_sample_fisher": Repair("D12", "method", {"mltfr.consensus.fisher": "batch_mean"}),
    "normalised_fisher": Repair("D13", "method", {"mltfr.consensus.normalise_fisher": False}),
    "shared_core": Repair("D14", "method", {"mltfr.expert.form": "paper"}),
    "validation_picks": Repair("D17", "protocol", {"evaluation.select_on": "test"}),
    "unseen_negatives": Repair("D18", "protocol", {"loss.negatives": "any"}),
}
"""Every repair by name."""

NEVER_PUBLISHED: dict[str, Any] = {
    "mltfr.router.balance_weight": 0.0,
    "mltfr.filter.shortlist_size": None,
}
"""What the published method does without: a load-balancing term, and a search in part of a table."""


def changed(config: RunConfig, fields: dict[str, Any], *, source: str) -> RunConfig:
    """``config`` with dotted ``fields`` changed, validated anew.

    Raises:
        ConfigError: The result is not valid.
    """
    values = config.model_dump(mode="json")
    for path, value in fields.items():
        *sections, name = path.split(".")
        place = values
        for section in sections:
            place = place[section]
        place[name] = value
    return validate(RunConfig, values, source=source)


def as_published(
    config: RunConfig, *, scopes: Iterable[Scope] = ("method", "backbone", "protocol")
) -> RunConfig:
    """``config`` with every repair of ``scopes`` taken away.

    The gate has one softmax, as in the published SASRec variant; `router.double_softmax` is that of the others. The
    published consensus merges tables of one width: give them in `mltfr.consensus.group`.
    """
    fields: dict[str, Any] = dict(NEVER_PUBLISHED) if "method" in set(scopes) else {}
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
        near = nearest_key(name, list(REPAIRS))
        raise ConfigError(
            f"There is no repair `{name}`" + (f"; the nearest is `{near}`." if near else "."),
            remedy=f"Repairs: {', '.join(REPAIRS)}.",
        )
    return changed(config, REPAIRS[name].published, source=f"the variant without {name}")


def taken_away(config: RunConfig) -> list[str]:
    """Names of the repairs that ``config`` does without: each of its published values stands there."""

    def value(path: str) -> Any:
        place: Any = config
        for name in path.split("."):
            place = getattr(place, name)
        return place

    return [
        name
        for name, repair in REPAIRS.items()
        if all(value(path) == wanted for path, wanted in repair.published.items())
    ]
