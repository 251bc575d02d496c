"""Metrics of what is recommended, whatever the users did next, one line each.

Shapes: U users, K items of a list, I items, W words of titles.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

USERS_AT_ONCE = 1 << 16


class Lists(NamedTuple):
    """The list of each user, and what training and titles say of the items."""

    items: np.ndarray
    """[U, K] item ids, best first; 0 where fewer were candidates."""
    in_histories: np.ndarray
    """[U] mean training interactions of the items of each user's full history."""
    interactions: np.ndarray
    """[I + 1] training interactions of each item."""
    users: np.ndarray
    """[I + 1] training sequences that hold each item."""
    num_users: int
    """Training sequences."""
    words: Any = None
    """[I + 1, W] scipy.sparse, a unit vector of the words of each title; zero where there is none.
    None where the data has no titles."""

    def first(self, k: int) -> Lists:
        """The first ``k`` of each list."""
        return self._replace(items=self.items[:, :k])

    def blocks(self) -> Iterator[np.ndarray]:
        """The lists of some users at a time [b, K]."""
        for start in range(0, len(self.items), USERS_AT_ONCE):
            yield self.items[start : start + USERS_AT_ONCE]


class ListMetric(NamedTuple):
    """What is measured of the first K of all lists."""

    value: Callable[[Lists], float]
    what: str
    reads_titles: bool = False


def coverage(lists: Lists) -> float:
    """Share of all items that stand in at least one list: catalog coverage (Ge, Delgado-Battenfeld
    and Jannach 2010, section 3.2).
    """
    covered = np.zeros(len(lists.interactions), dtype=bool)
    for items in lists.blocks():
        covered[items] = True
    return float(covered[1:].sum() / (len(covered) - 1))


def novelty(lists: Lists) -> float:
    """Mean over users and their items of -log2(training users of the item / training users), in
    bits: mean inverse user frequency (Zhou et al. 2010; Castells, Hurley and Vargas 2015, section
    26.3). An item that nobody has counts as if one had it.
    """
    return _mean(lists, -np.log2(np.maximum(lists.users, 1) / lists.num_users))


def recommended_popularity(lists: Lists) -> float:
    """Mean over users and their items of the item's training interactions: average recommendation
    popularity (Yin et al. 2012, section 5.1).
    """
    return _mean(lists, lists.interactions.astype(np.float64))


def popularity_lift(lists: Lists) -> float:
    """By which share :func:`recommended_popularity` is above the same mean over users' histories
    (Abdollahpouri et al. 2020, section 3.2, of all users as one group); 0 where it is equal.
    """
    before = math.fsum(lists.in_histories) / max(1, len(lists.in_histories))
    return recommended_popularity(lists) / before - 1 if before else 0.0


def diversity(lists: Lists) -> float:
    """Mean over users of 1 - cosine, over pairs of their items: intra-list diversity (Smyth and
    McClave 2001; Ziegler et al. 2005) of titles' words. Items without a word count in no pair, and
    users without a pair in no mean.
    """
    from scipy import sparse

    per_user = []
    there = np.diff(lists.words.indptr) > 0  # [I + 1]
    for items in lists.blocks():
        ends = np.arange(len(items) + 1) * items.shape[1]
        ones = np.ones(items.size)
        chosen = sparse.csr_matrix((ones, items.ravel(), ends), (len(items), len(there)))
        added = sparse.csr_matrix(chosen @ lists.words)  # [b, W], of unit vectors
        number = there[items].sum(1)
        pairs = number * (number - 1)  # of both orders
        cosines = np.asarray(added.multiply(added).sum(1)).ravel() - number
        per_user.append(1 - cosines[pairs > 0] / pairs[pairs > 0])
    values = np.concatenate(per_user or [np.zeros(0)])
    return math.fsum(values) / max(1, len(values))


def _mean(lists: Lists, of_items: np.ndarray) -> float:
    """Mean over users that have a list of the mean of ``of_items`` [I + 1] in it."""
    per_user = []
    for items in lists.blocks():
        there = items > 0
        number = there.sum(1)
        sums = np.where(there, of_items[items], 0.0).sum(1)
        per_user.append(sums[number > 0] / number[number > 0])
    values = np.concatenate(per_user or [np.zeros(0)])
    return math.fsum(values) / max(1, len(values))


LIST_METRICS: dict[str, ListMetric] = {
    "Coverage": ListMetric(coverage, "share of all items that stand in at least one list"),
    "Novelty": ListMetric(novelty, "bits of surprise: -log2 of the share of users that have it"),
    "ARP": ListMetric(recommended_popularity, "training interactions of what is recommended"),
    "PopularityLift": ListMetric(
        popularity_lift, "by which share ARP is above that of the users' histories"
    ),
    "ILD": ListMetric(
        diversity, "1 - cosine of titles' words, over pairs of a list", reads_titles=True
    ),
}


def list_metrics(lists: Lists, cutoffs: Sequence[int]) -> dict[str, float]:
    """Each of :data:`LIST_METRICS` at each K, those of titles only where there are titles."""
    return {
        f"{name}@{k}": metric.value(lists.first(k))
        for k in cutoffs
        for name, metric in LIST_METRICS.items()
        if not metric.reads_titles or lists.words is not None
    }
