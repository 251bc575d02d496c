"""Splits worked by hand, and the leak check on random interactions."""

from __future__ import annotations

from decimal import Decimal

import duckdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mltfr_dist.data.prepare.splits import (
    LeakError,
    check_no_leak,
    find_cuts,
    make_prefixes,
    time_text,
)
from mltfr_dist.errors import DataError

FRACTIONS = {"valid_fraction": 0.1, "test_fraction": 0.1}


def ordered(histories: dict[int, list[int]]) -> duckdb.DuckDBPyConnection:
    """A database with the table `ordered`: per user the times of the interactions; item codes are
    1, 2, ...
    """
    connection = duckdb.connect()
    connection.execute(
        "CREATE TABLE ordered(user_code BIGINT, item_code BIGINT, timestamp DECIMAL(38, 9), "
        "position BIGINT)"
    )
    rows = [
        (user, position, time, position)
        for user, times in histories.items()
        for position, time in enumerate(sorted(times), start=1)
    ]
    connection.executemany("INSERT INTO ordered VALUES (?, ?, ?, ?)", rows)
    return connection


def prefixes(connection: duckdb.DuckDBPyConnection) -> dict[int, tuple[int, ...]]:
    columns = "user_code, length, train_length, train_end, valid_end, test_end"
    return {
        row[0]: row[1:]
        for row in connection.execute(f"SELECT {columns} FROM prefixes ORDER BY 1").fetchall()
    }


def test_leave_one_out_by_hand():
    with ordered({1: [1, 2, 3, 4, 5], 2: [1, 2, 3], 3: [1, 2], 4: [9]}) as connection:
        assert make_prefixes(connection, "leave_one_out", **FRACTIONS) is None
        assert prefixes(connection) == {
            1: (5, 3, 3, 4, 5),
            2: (3, 1, 0, 2, 3),  # one item teaches nothing: no training sequence, but two targets
            3: (2, 2, 2, 0, 0),  # fewer than 3: training only
            4: (1, 1, 0, 0, 0),
        }
        check_no_leak(connection, None)


def test_global_temporal_by_hand():
    # Ten interactions, times 0..9: the first cut is at rank 6, the second at rank 8.
    histories = {1: [0, 1, 6, 7], 2: [2, 3, 8], 3: [4, 9], 4: [5]}
    with ordered(histories) as connection:
        cuts = make_prefixes(connection, "global_temporal", valid_fraction=0.2, test_fraction=0.2)
        assert cuts == (Decimal(6), Decimal(8))
        assert prefixes(connection) == {
            1: (
                4,
                2,
                2,
                3,
                0,
            ),  # target 6; 7 is neither (only a user's first in the period); nothing in test
            2: (3, 2, 2, 0, 3),
            3: (2, 1, 0, 0, 2),
            4: (1, 1, 0, 0, 0),
        }
        check_no_leak(connection, cuts)


def test_global_temporal_user_without_history_has_no_target():
    with ordered({1: [0, 1, 2, 3, 6, 8], 2: [6, 9], 3: [7]}) as connection:
        assert find_cuts(connection, 0.3, 0.2) == (Decimal(6), Decimal(8))
        make_prefixes(connection, "global_temporal", valid_fraction=0.3, test_fraction=0.2)
        assert prefixes(connection) == {1: (6, 4, 4, 5, 6), 2: (2, 0, 0, 0, 2), 3: (1, 0, 0, 0, 0)}


def test_cuts_keep_a_moment_together_and_are_refused_when_equal():
    with ordered({1: [0, 0, 0, 5, 5, 5, 5, 5, 5, 9]}) as connection:
        assert find_cuts(connection, 0.3, 0.1) == (Decimal(5), Decimal(9))
        with pytest.raises(
            DataError, match=r"earliest is 0, the cuts fall at 5 and 5.*leave_one_out"
        ):
            find_cuts(connection, 0.3, 0.2)


def test_empty_splits_are_refused():
    with (
        ordered({1: [1, 2], 2: [3]}) as connection,
        pytest.raises(DataError, match=r"no valid sequence.*longest history has 2"),
    ):
        make_prefixes(connection, "leave_one_out", **FRACTIONS)
    with ordered({1: [1, 2, 3]}) as connection, pytest.raises(DataError, match="no train sequence"):
        make_prefixes(connection, "leave_one_out", **FRACTIONS)


@pytest.mark.parametrize(
    ("split", "change"),
    [
        ("leave_one_out", "train_end = train_end + 1"),
        ("leave_one_out", "valid_end = valid_end + 1"),
        ("leave_one_out", "test_end = test_end - 1"),
        ("global_temporal", "train_end = train_end + 1"),
        ("global_temporal", "valid_end = valid_end + 1"),
        ("global_temporal", "valid_end = valid_end - 1"),
        ("global_temporal", "test_end = test_end - 1"),
    ],
)
def test_a_leak_is_found(split, change):
    with ordered({1: [0, 1, 2, 3, 6, 7, 8, 9]}) as connection:
        cuts = make_prefixes(connection, split, valid_fraction=0.25, test_fraction=0.25)
        check_no_leak(connection, cuts)
        connection.execute(f"UPDATE prefixes SET {change}")
        with pytest.raises(LeakError, match=change.split("_")[0]):
            check_no_leak(connection, cuts)


def test_a_leak_by_wrong_order_is_found():
    with ordered({1: [1, 2, 3, 4, 5]}) as connection:
        make_prefixes(connection, "leave_one_out", **FRACTIONS)
        connection.execute("UPDATE ordered SET timestamp = 9 WHERE position = 1")
        with pytest.raises(LeakError):
            check_no_leak(connection, None)


HISTORIES = st.dictionaries(
    st.integers(1, 8), st.lists(st.integers(0, 12), min_size=1, max_size=9), min_size=1, max_size=8
)


@settings(max_examples=40, deadline=None)
@given(histories=HISTORIES, split=st.sampled_from(["leave_one_out", "global_temporal"]))
def test_no_random_interactions_leak(histories, split):
    with ordered(histories) as connection:
        try:
            cuts = make_prefixes(connection, split, valid_fraction=0.2, test_fraction=0.2)
        except DataError:
            return
        check_no_leak(connection, cuts)
        for user, (length, _, train_end, valid_end, test_end) in prefixes(connection).items():
            times = sorted(histories[user])
            assert length == len(times)
            if cuts is None:
                assert train_end <= max(length - 2, 0) or length < 3
                assert (valid_end, test_end) == ((length - 1, length) if length >= 3 else (0, 0))
                continue
            first, second = cuts
            assert all(time < first for time in times[:train_end])
            for end, start, stop in ((valid_end, first, second), (test_end, second, 99)):
                due = [time for time in times if start <= time < stop]
                before = [time for time in times if time < start]
                assert end == (len(before) + 1 if due and before else 0)


def test_time_text():
    assert [time_text(Decimal(text)) for text in ("100.000000000", "1.500000000", "100")] == [
        "100",
        "1.5",
        "100",
    ]
