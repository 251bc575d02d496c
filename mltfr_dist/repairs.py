"""What the published procedure does, what is done here instead, and the switches that bring each
defect back.

One entry a defect of docs/method.md. All switches are off; :func:`as_published` gives the published
form, and :func:`without` takes a single repair away.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from mltfr_dist.config import RunConfig
from mltfr_dist.config.published import MLTFR, NOISE, USER_GUIDED, Need, lacking
from mltfr_dist.errors import ConfigError
from mltfr_dist.schema import changed, or_nearest, value_at

Scope = Literal["method", "backbone", "protocol"]


class Repair(NamedTuple):
    """One difference between the published procedure and this one."""

    defect: str
    """Its number in docs/method.md."""
    scope: Scope
    """method: MLTFR itself; backbone: the model it is added to; protocol: training and evaluation
    of any model.
    """
    switches: tuple[str, ...]
    """Fields of `published` that bring the defect back."""
    values: Mapping[str, Any] = MappingProxyType({})
    """What is set beside them, dotted field to value; the defect itself where it has no switch."""
    needs: tuple[Need, ...] = ()
    """What a run must have for values alone to be a defect; each switch has its own."""


REPAIRS: dict[str, Repair] = {
    "soft_weights": Repair(
        "D1",
        "method",
        ("straight_through",),
        {"mltfr.filter.top_k": 1, "mltfr.filter.filter_ratio": None},
    ),
    "sharp_scores": Repair(
        "D2",
        "method",
        (),
        {
            "mltfr.filter.temperature": 0.5,
            "mltfr.filter.learn_temperature": False,
            "mltfr.filter.noise": 1.0,
        },
        needs=(MLTFR, USER_GUIDED),
    ),
    "quiet_evaluation": Repair(
        "D3", "method", ("noise_in_evaluation",), {"mltfr.filter.noise": 1.0}
    ),
    "user_memory": Repair("D4", "method", ("pooled_memory",)),
    "causal_query": Repair("D5", "method", ("whole_history_query",)),
    "causal_filter": Repair("D6", "backbone", ("whole_sequence_filter",)),
    "frozen_tables": Repair("D7", "method", ("trained_tables",)),
    "read_the_mask": Repair("D8", "backbone", ("read_before_mask",)),
    "masked_padding": Repair("D9", "backbone", ("attending_padding",)),
    "single_softmax": Repair("D10", "method", ("double_softmax",)),
    "going_on": Repair("D10b", "method", ("random_consensus", "fresh_start")),
    "per_sample_fisher": Repair("D12", "method", ("batch_mean_fisher",)),
    "normalised_fisher": Repair("D13", "method", ("unnormalised_fisher",)),
    "shared_core": Repair("D14", "method", ("unaligned_experts",)),
    "validation_picks": Repair("D17", "protocol", ("pick_on_test",)),
    "unseen_negatives": Repair("D18", "protocol", ("negatives_outside_inputs",)),
}
"""Every repair by name."""

ALSO_PUBLISHED: dict[Scope, dict[str, Any]] = {
    "method": {
        "mltfr.router.balance_weight": 0.0,
        "mltfr.filter.shortlist_size": None,
        "mltfr.consensus.fisher_sequences": 1 << 62,
        "published.consensus_without_dropout": True,
        "published.fisher_at_last_epoch": True,
    },
    "protocol": {
        "published.train_on_validation": True,
        "evaluation.select_by": "HR@20",
        "evaluation.filter_seen": False,
    },
}
"""What else the authors set, each a choice and no defect of MLTFR."""


def applies(config: RunConfig, name: str) -> bool:
    """Whether a run has what a repair repairs."""
    repair = REPAIRS[name]
    missing = {given for switch in repair.switches for given in lacking(config, switch)}
    return missing <= {NOISE.given} and all(need.is_met(config) for need in repair.needs)


def as_published(
    config: RunConfig, *, scopes: Iterable[Scope] = ("method", "backbone", "protocol")
) -> RunConfig:
    """``config`` with every repair of ``scopes`` that applies to it taken away.

    The gate has one softmax, as in the published SASRec variant; `published.double_softmax` is that
    of the others. The published consensus merges tables of one width: give them in
    `mltfr.consensus.group`.
    """
    wanted = set(scopes)
    for name, repair in REPAIRS.items():
        if repair.scope in wanted and name != "single_softmax" and applies(config, name):
            config = without(config, name)
    for scope in sorted(wanted & ALSO_PUBLISHED.keys()):
        fields = {
            path: value
            for path, value in ALSO_PUBLISHED[scope].items()
            if not path.startswith("published.") or not lacking(config, path.partition(".")[2])
        }
        config = changed(config, fields, source="the published form")
    return config


def without(config: RunConfig, name: str) -> RunConfig:
    """``config`` with one repair taken away.

    Raises:
        ConfigError: No repair has that name (the nearest is named), or the run has not what it
            repairs.
    """
    if name not in REPAIRS:
        raise ConfigError(
            f"There is no repair `{name}`{or_nearest(name, list(REPAIRS))}.",
            remedy=f"Repairs: {', '.join(REPAIRS)}.",
        )
    switches = {f"published.{switch}": True for switch in REPAIRS[name].switches}
    return changed(
        config, {**REPAIRS[name].values, **switches}, source=f"the variant without {name}"
    )


def taken_away(config: RunConfig) -> list[str]:
    """Names of the repairs that ``config`` does without: their switches are on."""

    def is_taken_away(repair: Repair) -> bool:
        if repair.switches:
            return any(getattr(config.published, switch) for switch in repair.switches)
        return all(need.is_met(config) for need in repair.needs) and all(
            value_at(config, path) == value for path, value in repair.values.items()
        )

    return [name for name, repair in REPAIRS.items() if is_taken_away(repair)]
