"""The registry of baselines without a training loop: configuration, reports and help follow from a
line.
"""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """Where a baseline is found and what it is."""

    path: str
    """``module:function`` under ``mltfr_dist.training.evaluating``: training sequences, number of
    items and ``through`` to a scorer."""
    what: str
    """What it recommends, with its source."""


BASELINES: dict[str, Entry] = {
    "popularity": Entry("baselines:popularity", "the items that training has most often"),
    "recent_popularity": Entry(
        "baselines:recent_popularity", "the same, of each sequence's last 5 training items"
    ),
    "item_knn": Entry(
        "baselines:item_knn", "items whose users are those of the history (Sarwar et al. 2001)"
    ),
    "markov_chain": Entry(
        "baselines:markov_chain", "items that most often follow the last one, then popular ones"
    ),
    "ease": Entry("linear_baselines:ease", "a linear model of items by items (Steck 2019)"),
    "ials": Entry(
        "linear_baselines:ials", "matrix factorisation by least squares (Hu et al. 2008)"
    ),
}
