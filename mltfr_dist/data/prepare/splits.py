"""Train, validation and test sequences as prefixes of each user's history, and the proof that
nothing leaks.

Every sequence of every split is a prefix of one user's interactions in time order, so a split is
one small table ``prefixes``: where the user's sequence of each split ends, and how many of its last
interactions are targets. A prefix of length 0 is not stored.

* ``train``: every item is history; sequences of one item teach nothing and are not stored.
* ``valid`` and ``test``: the last item, or all items of the period, are targets; everything before
  them is the history.

Everything here reads ``ordered(user_code, item_code, timestamp, position)`` with positions 1.. per
user.
"""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import duckdb

from mltfr_dist.data.shards.manifest import SPLITS
from mltfr_dist.data.sources.readers import one
from mltfr_dist.data.sources.times import time_text
from mltfr_dist.errors import DataError

MIN_TRAIN_LENGTH = 2
Cuts = tuple[Decimal, Decimal]


class LeakError(AssertionError):
    """A training sequence or a history holds what it must predict: a defect of this program, not of
    the data.
    """


def leave_one_out_sql() -> str:
    """SELECT for ``prefixes``: last item test, the one before it validation, the rest training.

    A user with fewer than 3 interactions has no target to spare and is training only.

    Returns:
        SQL with columns user_code, length, train_length, train_end, and of valid and test _end and
        _targets.
    """
    return _prefixes_sql(
        "SELECT user_code, count(*) AS length, CASE WHEN count(*) >= 3 THEN count(*) - 2 ELSE "
        "count(*) END AS train_length, "
        "CASE WHEN count(*) >= 3 THEN count(*) - 1 ELSE 0 END AS valid_end, "
        "CASE WHEN count(*) >= 3 THEN count(*) ELSE 0 END AS test_end, "
        "1 AS valid_targets, 1 AS test_targets FROM ordered GROUP BY user_code"
    )


def global_temporal_sql(cuts: Cuts, targets: str) -> str:
    """SELECT for ``prefixes``: two points in time cut all users alike.

    Training is what lies before the first cut. Validation targets are a user's interactions from
    the first cut on and before the second, test targets those from the second cut on: the first of
    them, or all. All before a period is its history, which must not be empty.

    Args:
        cuts: first and second cut, in the unit of ``ordered.timestamp``.
        targets: next or all (see ``PrepareConfig.targets``).

    Returns:
        SQL with columns user_code, length, train_length, train_end, and of valid and test _end and
        _targets.
    """
    first, second = (f"CAST('{cut}' AS DECIMAL(38, 9))" for cut in cuts)
    before_first, before_second = (
        f"count(*) FILTER (timestamp < {cut})" for cut in (first, second)
    )
    periods = {"valid": (before_first, before_second), "test": (before_second, "count(*)")}
    columns = []
    for name, (start, end) in periods.items():
        number = "1" if targets == "next" else f"{end} - {start}"
        there = f"{start} > 0 AND {end} > {start}"
        columns.append(f"CASE WHEN {there} THEN {start} + {number} ELSE 0 END AS {name}_end")
        columns.append(f"{number} AS {name}_targets")
    return _prefixes_sql(
        f"SELECT user_code, count(*) AS length, {before_first} AS train_length, "
        f"{', '.join(columns)} FROM ordered GROUP BY user_code"
    )


def _prefixes_sql(ends: str) -> str:
    train_end = f"CASE WHEN train_length >= {MIN_TRAIN_LENGTH} THEN train_length ELSE 0 END"
    return (
        f"SELECT user_code, length, train_length, {train_end} AS train_end, valid_end, "
        f"valid_targets, test_end, test_targets FROM ({ends})"
    )


def find_cuts(
    connection: duckdb.DuckDBPyConnection, valid_fraction: float, test_fraction: float
) -> Cuts:
    """The two cut times, so that about these fractions of all interactions lie between and after
    them.

    Interactions of one moment stay together, so coarse times (days) move the fractions.

    Raises:
        DataError: the times do not separate three periods.
    """
    total, earliest = one(connection, "SELECT count(*), min(timestamp) FROM ordered")

    def at(rank: int) -> Decimal:
        # A running count per moment, not a sort of all rows in memory.
        row = one(
            connection,
            "SELECT min(timestamp) FROM (SELECT timestamp, sum(count(*)) OVER (ORDER BY timestamp) "
            "AS up_to "
            "FROM ordered GROUP BY timestamp) WHERE up_to > $1",
            [min(rank, total - 1)],
        )
        return Decimal(row[0])

    first = at(math.floor(total * (1 - valid_fraction - test_fraction) + 1e-9))
    second = at(math.floor(total * (1 - test_fraction) + 1e-9))
    if not earliest < first < second:
        raise DataError(
            f"The times do not separate training, validation and test: the earliest is "
            f"{time_text(Decimal(earliest))}, "
            f"the cuts fall at {time_text(first)} and {time_text(second)}.",
            rule="global_temporal needs earliest < first cut < second cut.",
            remedy="Use finer times, other `--valid-fraction` and `--test-fraction`, or "
            "`--split leave_one_out`.",
        )
    return first, second


def make_prefixes(
    connection: duckdb.DuckDBPyConnection,
    split: str,
    *,
    targets: str = "next",
    valid_fraction: float,
    test_fraction: float,
) -> Cuts | None:
    """Create the table ``prefixes`` and return the cut times (None for leave_one_out).

    Raises:
        DataError: the times cannot be cut, or a split would be empty.
    """
    cuts = (
        find_cuts(connection, valid_fraction, test_fraction) if split == "global_temporal" else None
    )
    connection.execute(
        f"CREATE OR REPLACE TABLE prefixes AS "
        f"{global_temporal_sql(cuts, targets) if cuts else leave_one_out_sql()}"
    )
    for name in SPLITS:
        if not one(connection, f"SELECT count(*) FROM prefixes WHERE {name}_end > 0")[0]:
            longest = one(connection, "SELECT max(length) FROM prefixes")[0]
            raise DataError(
                f"The {split} split leaves no {name} sequence (the longest history has {longest} "
                f"interactions).",
                rule="Training needs 2 items of a user, and validation and test a target with a "
                "history before it: "
                "leave_one_out gives a user with 4 interactions all three.",
                remedy="Give more data, or another split or fractions.",
            )
    return cuts


def check_no_leak(connection: duckdb.DuckDBPyConnection, cuts: Cuts | None) -> None:
    """Prove on the tables ``ordered`` and ``prefixes`` that no sequence holds what lies at or after
    its cut.

    It compares interactions with the cut itself (leave one out: the user's last two; else the cut
    times) and does not trust how ``prefixes`` was made.

    Raises:
        LeakError: with the number of interactions that leak.
    """
    facts = (
        "SELECT o.position, o.timestamp, p.train_end, p.valid_end, p.test_end, "
        "p.valid_end - p.valid_targets AS valid_history, "
        "p.test_end - p.test_targets AS test_history, "
        "count(*) OVER users AS total, row_number() OVER (PARTITION BY o.user_code ORDER BY "
        "o.timestamp DESC, o.position DESC) "
        "AS from_end FROM ordered o JOIN prefixes p USING (user_code) WINDOW users AS (PARTITION "
        "BY o.user_code)"
    )
    parameters: list[Any] = []
    if cuts is None:
        rules = {
            "train": "position <= train_end AND total >= 3 AND from_end <= 2",
            "valid": "position <= valid_end AND (from_end = 1 OR (position = valid_end) <> (from_end = 2))",  # noqa: E501
            "test": "position <= test_end AND (position = test_end) <> (from_end = 1)",
        }
    else:
        first, second = "CAST($1 AS DECIMAL(38, 9))", "CAST($2 AS DECIMAL(38, 9))"
        parameters = [str(cut) for cut in cuts]
        rules = {
            "train": f"position <= train_end AND timestamp >= {first}",
            "valid": f"position <= valid_end AND ((position > valid_history) <> (timestamp >= {first}) OR timestamp >= {second})",  # noqa: E501
            "test": f"position <= test_end AND (position > test_history) <> (timestamp >= {second})",  # noqa: E501
        }
        if not cuts[0] < cuts[1]:
            raise LeakError(f"The cut times are not in order: {cuts}.")
    counts = ", ".join(f"count(*) FILTER ({rule})" for rule in rules.values())
    counted = one(connection, f"SELECT {counts} FROM ({facts})", parameters)
    if any(counted):
        broken = ", ".join(f"{count} in {name}" for name, count in zip(rules, counted) if count)
        raise LeakError(
            f"Interactions on the wrong side of their cut: {broken}. Please report this as a "
            f"defect."
        )
