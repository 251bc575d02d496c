"""The registry of routers: configuration, models and help follow from a line."""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """Where a router is found and what it is."""

    path: str
    """``module:class`` under ``mltfr_dist.models``: a :class:`Router`."""
    what: str
    """How it weighs the experts, with its source."""


ROUTERS: dict[str, Entry] = {
    "softmax": Entry("router:Router", "a linear layer and a softmax over the experts"),
    "sigmoid": Entry(
        "router:SigmoidRouter",
        "a sigmoid for each expert, divided by their sum (DeepSeek-V3, arXiv 2412.19437)",
    ),
}
