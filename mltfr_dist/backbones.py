"""The registry of backbones: one line for each, from which the configuration, the models and the help text follow."""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """Where a backbone is found and what it is."""

    path: str
    """``module:class`` under ``mltfr_dist.models``."""
    paper: str
    """What it is, with its source."""


BACKBONES: dict[str, Entry] = {
    "sasrec": Entry("sasrec:SASRec", "Kang and McAuley 2018, causal transformer"),
}
