"""Fields of older releases, and what stands in their place: for error messages only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

MOVED: dict[str, tuple[Any, tuple[str, ...]]] = {
    "backbone.mask_ratio": (
        0.2,
        ("backbone.bert4rec.mask_ratio", "backbone.cl4srec.mask_ratio"),
    ),
    "backbone.crop_ratio": (0.6, ("backbone.cl4srec.crop_ratio",)),
    "backbone.reorder_ratio": (0.6, ("backbone.cl4srec.reorder_ratio",)),
    "backbone.low_frequencies": (3, ("backbone.bsarec.low_frequencies",)),
    "backbone.inductive_bias": (0.7, ("backbone.bsarec.inductive_bias",)),
    "loss.contrast_weight": (0.1, ("backbone.cl4srec.contrast_weight",)),
    "loss.contrast_temperature": (1.0, ("backbone.cl4srec.contrast_temperature",)),
    "loss.contrast_group": (16, ("backbone.cl4srec.contrast_group",)),
}
"""The default, and where another value goes, one of these by the backbone."""

PADDED = ("fmlp", "bsarec", "linrec")

INSTEAD: dict[str, dict[Any, str]] = {
    "backbone.filter_scope": {
        "sequence": "published.whole_sequence_filter=true",
        "padded": "backbone.name=" + " or ".join(f"{name}_original" for name in PADDED),
    },
    "backbone.padding": {"attended": "published.attending_padding=true"},
    "backbone.read_at": {"before_mask": "published.read_before_mask=true"},
    "mltfr.filter.query": {"history": "published.whole_history_query=true"},
    "mltfr.filter.weights": {"straight_through": "published.straight_through=true"},
    "mltfr.filter.memory": {"batch": "published.pooled_memory=true"},
    "mltfr.filter.noise_in_evaluation": {True: "published.noise_in_evaluation=true"},
    "mltfr.train_tables": {True: "published.trained_tables=true"},
    "mltfr.expert.form": {"paper": "published.unaligned_experts=true"},
    "mltfr.router.double_softmax": {True: "published.double_softmax=true"},
    "mltfr.consensus.dropout": {False: "published.consensus_without_dropout=true"},
    "mltfr.consensus.fisher_at": {"last": "published.fisher_at_last_epoch=true"},
    "mltfr.consensus.fisher": {"batch_mean": "published.batch_mean_fisher=true"},
    "mltfr.consensus.normalise_fisher": {False: "published.unnormalised_fisher=true"},
    "mltfr.consensus.random_in_stage_one": {True: "published.random_consensus=true"},
    "mltfr.consensus.fresh_start": {True: "published.fresh_start=true"},
    "loss.negatives": {"outside_inputs": "published.negatives_outside_inputs=true"},
    "data.train_on": {"train_and_valid": "published.train_on_validation=true"},
    "evaluation.select_on": {"test": "published.pick_on_test=true"},
}
"""What says today what a value said; of any other value nothing has to be said, for it is the
default.
"""


def moved_to(path: str) -> list[str]:
    """The fields that stand today in the place of a former one; none of any other."""
    instead = [text.partition("=")[0] for text in INSTEAD.get(path, {}).values()]
    return [*MOVED.get(path, (None, ()))[1], *instead]


def moved(fields: Mapping[str, Any]) -> list[str]:
    """What is said of ``fields``, dotted key to value; nothing of those that never were."""
    said, left_out = [], []
    for path, value in fields.items():
        default, fields_now = MOVED.get(path, (None, ()))
        instead = INSTEAD.get(path, {})
        now = instead.get(value) if isinstance(value, bool | str) else None
        shown = f"`{path}={value if isinstance(value, str) else json.dumps(value)}`"
        if now is not None:
            said.append(f"{shown} moved: `{now}`")
        elif fields_now and value != default:
            said.append(f"{shown} moved: {' or '.join(f'`{field}`' for field in fields_now)}")
        elif fields_now or instead:
            left_out.append(f"`{path}`")
    if left_out:
        said.append(
            f"{', '.join(left_out)}: no longer there, and as given the default: leave "
            f"{'it' if len(left_out) == 1 else 'them'} out"
        )
    return said
