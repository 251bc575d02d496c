"""Errors cross process borders with all that they say."""

from __future__ import annotations

import pickle

import pytest

from mltfr_dist.errors import ConfigError, MltfrError, OtherRankError, StoppedError


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("x is wrong.", rule="It must be right.", remedy="Correct it."),
        StoppedError("Stopped.", remedy="Go on."),
        OtherRankError("Rank 0 says why.", remedy="See there.", exit_code=75),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_is_the_same_on_the_other_side(error: MltfrError) -> None:
    there = pickle.loads(pickle.dumps(error))
    assert type(there) is type(error)
    assert str(there) == str(error)
    assert (there.what, there.rule, there.remedy, there.exit_code) == (
        error.what,
        error.rule,
        error.remedy,
        error.exit_code,
    )
