"""The steps of preparation, each one SQL from table to table, so that DuckDB can work out of core.

Tables, in the order they are made (all in a database file that is removed at the end)::

    interactions  row_number, user_id, item_id, timestamp           as read, ids as text
    events        row_number, user_code, item_code, timestamp
                  without duplicates; then only the k-core
    ordered       user_code, item_code, timestamp, position
                  position 1.. in time; ties keep file order
    prefixes      user_code, length, train_end, ...                 see splits.py
    item_map      item_code, item_index, item_id, title, ...        item_index 1..num_items
    user_map      user_code, user_index, user_id, length, ends      user_index 0..num_users-1

Codes go by id text. Item ids go by occurrences in the stored training sequences, most first
(equal ones by id text), so low ids are popular items and nothing of the held-out periods shows in
them; users go by id text. ``count`` has every training interaction, ``stored`` those that a stored
sequence holds: a training part of one item is counted and not stored. ``ordered`` and ``user_map``
lie on disk in the order of user_code, so that a run of users is read without looking at the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import duckdb

from mltfr_dist.data.shards.manifest import CoreRound
from mltfr_dist.data.sources.readers import one
from mltfr_dist.errors import DataError

Log = Callable[[str], None]


class StepLog:
    """The table that is printed while work goes on: one line a step, with its rate."""

    def __init__(self, log: Log) -> None:
        self.log = log
        self.started = time.perf_counter()
        log(f"{'step':<22}{'interactions':>14}{'dropped':>12}{'seconds':>9}{'rows/s':>13}  note")

    def done(self, name: str, rows: int, dropped: int = 0, note: str = "") -> None:
        """Report a step that read ``rows + dropped`` rows and kept ``rows``."""
        now = time.perf_counter()
        seconds, self.started = now - self.started, now
        rate = (rows + dropped) / max(seconds, 1e-9)
        self.log(
            f"{name:<22}{rows:>14,}{dropped:>12,}{seconds:>9.2f}{rate:>13,.0f}  {note}".rstrip()
        )


def drop_duplicates(connection: duckdb.DuckDBPyConnection, mode: str) -> int:
    """``interactions`` -> ``events`` with integer codes; returns the rows that are left.

    Args:
        connection: holds ``interactions``, which is dropped; ``user_codes`` and ``item_codes`` are
            made.
        mode: exact, first or keep (see ``PrepareConfig.duplicates``).
    """
    for kind in ("user", "item"):
        connection.execute(
            f"CREATE TABLE {kind}_codes AS SELECT CAST(row_number() OVER (ORDER BY {kind}_id) AS "
            f"INTEGER) AS {kind}_code, "
            f"{kind}_id, {kind}_key FROM (SELECT CAST({kind}_id AS VARCHAR) AS {kind}_id, "
            f"{kind}_id AS {kind}_key "
            f"FROM (SELECT DISTINCT {kind}_id FROM interactions))"
        )
    coded = (
        "SELECT row_number, user_code, item_code, timestamp FROM interactions "
        "JOIN user_codes ON interactions.user_id = user_key JOIN item_codes ON "
        "interactions.item_id = item_key"
    )
    kept = {
        "keep": coded,
        "exact": "SELECT min(row_number) AS row_number, user_code, item_code, timestamp "
        f"FROM ({coded}) GROUP BY user_code, item_code, timestamp",
        "first": f"SELECT * FROM ({coded}) "
        "QUALIFY row_number() OVER (PARTITION BY user_code, item_code ORDER BY timestamp, "
        "row_number) = 1",
    }[mode]
    connection.execute(f"CREATE TABLE events AS {kept}")
    for kind in ("user", "item"):
        connection.execute(f"ALTER TABLE {kind}_codes DROP {kind}_key")
    connection.execute("DROP TABLE interactions")
    return count_rows(connection, "SELECT count(*) FROM events")


def _lower_counts(connection: duckdb.DuckDBPyConnection, kind: str) -> None:
    """Take the interactions in ``gone`` off the counts of users or of items."""
    connection.execute(
        f"CREATE OR REPLACE TABLE {kind}_counts AS SELECT {kind}_code, "
        f"number - coalesce(fewer, 0) AS number FROM {kind}_counts LEFT JOIN "
        f"(SELECT {kind}_code, count(*) AS fewer FROM gone GROUP BY {kind}_code) "
        f"USING ({kind}_code) WHERE number > coalesce(fewer, 0)"
    )


def k_core(
    connection: duckdb.DuckDBPyConnection,
    user_core: int,
    item_core: int,
    steps: StepLog | None = None,
) -> tuple[CoreRound, ...]:
    """Remove from ``events``, in rounds, users and items with too few interactions.

    A round counts users and items in the same state and removes both. Counts are made once, and
    lowered by what goes.

    Raises:
        DataError: nothing is left; it says after which round, and what was there before.
    """
    rounds: list[CoreRound] = []
    left = count_rows(connection, "SELECT count(*) FROM events")
    least = {"user": user_core, "item": item_core}
    for kind in least:
        connection.execute(
            f"CREATE TABLE {kind}_counts AS SELECT {kind}_code, count(*) AS number FROM events "
            f"GROUP BY {kind}_code"
        )
    while True:
        removed, before = {}, {}
        for kind, core in least.items():
            connection.execute(
                f"CREATE OR REPLACE TABLE few_{kind} AS SELECT {kind}_code FROM {kind}_counts "
                f"WHERE number < {core:d}"
            )
            removed[kind] = count_rows(connection, f"SELECT count(*) FROM few_{kind}")
            before[kind] = count_rows(connection, f"SELECT count(*) FROM {kind}_counts")
        if not any(removed.values()):
            return tuple(rounds)
        connection.execute(
            "CREATE OR REPLACE TABLE gone AS SELECT rowid AS row, user_code, item_code FROM events "
            "WHERE user_code IN (FROM few_user) OR item_code IN (FROM few_item)"
        )
        connection.execute("DELETE FROM events WHERE rowid IN (SELECT row FROM gone)")
        for kind in least:
            _lower_counts(connection, kind)
        was, left = left, count_rows(connection, "SELECT count(*) FROM events")
        rounds.append(
            CoreRound(
                users_removed=removed["user"], items_removed=removed["item"], interactions_left=left
            )
        )
        if steps:
            users = f"{removed['user']:,} users below {user_core}"
            note = f"{users}, {removed['item']:,} items below {item_core}"
            steps.done(f"k-core round {len(rounds)}", left, was - left, note)
        if not left:
            raise DataError(
                f"Nothing is left after round {len(rounds)} of the k-core; before that round there "
                f"were {was:,} interactions of {before['user']:,} users with {before['item']:,} "
                "items.",
                rule=f"Every kept user has at least {user_core} interactions (--user-core) "
                f"and every item {item_core} (--item-core).",
                remedy="Lower --user-core or --item-core, or give more data.",
            )


def order_by_time(connection: duckdb.DuckDBPyConnection) -> int:
    """``events`` -> ``ordered`` with positions 1.. per user, by time, then file order; returns the
    number of ties.
    """
    connection.execute(
        "CREATE TABLE ordered AS SELECT user_code, item_code, timestamp, row_number() OVER history "
        "AS position, "
        "coalesce(lag(timestamp) OVER history = timestamp, false) AS is_tie FROM events "
        "WINDOW history AS (PARTITION BY user_code ORDER BY timestamp, row_number) ORDER BY "
        "user_code, position"
    )
    connection.execute("DROP TABLE events")
    return count_rows(connection, "SELECT count(*) FROM ordered WHERE is_tie")


def make_id_maps(connection: duckdb.DuckDBPyConnection) -> None:
    """``ordered`` and ``prefixes`` -> ``item_map`` and ``user_map`` (see the head of this file)."""
    connection.execute(
        "CREATE TABLE item_map AS WITH counts AS (SELECT item_code, "
        "count(*) FILTER (position <= train_end) AS stored, "
        "count(*) FILTER (position <= train_length) AS count "
        "FROM ordered JOIN prefixes USING (user_code) GROUP BY item_code) "
        "SELECT item_code, row_number() OVER (ORDER BY stored DESC, item_id) AS item_index, "
        "item_id, title, count, stored "
        "FROM counts JOIN item_codes USING (item_code) LEFT JOIN titles USING (item_id)"
    )
    connection.execute(
        "CREATE TABLE user_map AS SELECT user_code, row_number() OVER (ORDER BY user_code) - 1 AS "
        "user_index, user_id, length, "
        "train_end, valid_end, valid_targets, test_end, test_targets FROM prefixes JOIN user_codes "
        "USING (user_code) ORDER BY user_code"
    )


def count_cold(connection: duckdb.DuckDBPyConnection, split: str) -> int:
    """Targets of ``split`` that no stored training sequence holds; a user's again count once."""
    return count_rows(
        connection,
        "SELECT count(DISTINCT (user_code, item_code)) FROM ordered JOIN prefixes USING "
        "(user_code) JOIN item_map USING (item_code) "
        f"WHERE position <= {split}_end AND position > {split}_end - {split}_targets "
        "AND stored = 0",
    )


def count_rows(connection: duckdb.DuckDBPyConnection, sql: str) -> int:
    """The single number that ``sql`` selects."""
    return int(one(connection, sql)[0])
