"""The registry of filter strategies: one line for each, from which the configuration, the models
and the help text follow.
"""

from __future__ import annotations

from typing import NamedTuple


class Entry(NamedTuple):
    """Where a strategy is found and what it is."""

    path: str
    """``module:class`` under ``mltfr_dist.models.selectors``."""
    what: str
    """What a query reads of a table."""
    needs_whole_table: bool = True
    """Whether a rank must hold all rows of a table at once."""


SELECTORS: dict[str, Entry] = {
    "user_guided": Entry(
        "user_guided:UserGuided", "the rows nearest to the user's history", needs_whole_table=False
    ),
    "random_tokens": Entry(
        "others:RandomTokens",
        "(a control) as many rows drawn uniformly for each history",
        needs_whole_table=False,
    ),
    "direct": Entry("others:AllRows", "all rows"),
    "learned_prototypes": Entry("others:Prototypes", "rows that a perceptron makes from all"),
    "seed_words": Entry("others:AllRows", "the rows of given words and their neighbours"),
}
