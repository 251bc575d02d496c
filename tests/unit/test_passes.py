"""The arithmetic of benchmarks/passes.py."""

from __future__ import annotations

from collections import defaultdict

import pytest

from benchmarks.passes import shares, timed


def test_passes_are_given_in_epochs_without_the_first() -> None:
    spent = {"train_epoch": [9.0, 2.0, 4.0], "validate": [0.3, 0.6], "consensus_core": [6.0]}
    assert shares(spent) == pytest.approx(
        {"epoch_seconds": 3.0, "validate": 0.15, "consensus_core": 2.0}
    )
    assert shares({"train_epoch": [4.0], "validate": [1.0]})["validate"] == 0.25


def test_a_watched_call_gives_what_it_gave() -> None:
    spent: dict[str, list[float]] = defaultdict(list)
    assert timed("pass", lambda a, b: a - b, spent)(5, 3) == 2
    assert len(spent["pass"]) == 1
