"""The registry of losses: configuration, batches and help follow from a line."""

from __future__ import annotations

from typing import Literal, NamedTuple


class Entry(NamedTuple):
    """Where a loss is found and what it is."""

    path: str
    """``module:function`` under ``mltfr_dist.models``: :class:`Scored` -> the weighted sum."""
    what: str
    negatives: Literal["none", "per_position", "shared"] = "none"
    """What batches draw for it, ``loss.num_negatives`` of them: none, for it scores all items;
    per_position: a position's own, outside the user's history; shared: drawn once an update."""


LOSSES: dict[str, Entry] = {
    "cross_entropy": Entry("losses:all_items", "softmax over all items"),
    "sampled_softmax": Entry(
        "losses:shared_items",
        "over the target and sampled items, logQ-corrected",
        negatives="shared",
    ),
    "bce": Entry(
        "losses:sampled_items", "binary, against sampled negatives", negatives="per_position"
    ),
    "gbce": Entry(
        "losses:tempered_items",
        "bce with a tempered positive (Petrov and Macdonald 2023)",
        negatives="per_position",
    ),
}
