"""Values that can be read and are wrong all the same: found before any work is done on them, and named with their row."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal

import duckdb

from mltfr_dist.data.readers import EMPTY, one
from mltfr_dist.data.splits import time_text
from mltfr_dist.errors import DataError

Locate = Callable[[int], str]
"""From a row number to `file, line N`."""

_WRONG_IDS = {
    "is empty": EMPTY,
    "is NaN": "regexp_full_match(trim({0}), '[+-]?(nan|inf(inity)?)', 'i')",
    "is a rounded number": "regexp_full_match(trim({0}), '[+-]?([0-9](\\.[0-9]+)?[eE]\\+?[0-9]+|[0-9]{{16,}}\\.0+)')",
    "holds a tab, a line end or another control character": (
        "regexp_matches({0}, '[\\x00-\\x1F\\x7F-\\x{{9F}}\\x{{2028}}\\x{{2029}}]')"
    ),
}
_REMEDIES = {
    "holds a tab, a line end or another control character": "Replace it in that id, or remove that row.",
    "is a rounded number": "Write ids as text or whole numbers: floating point keeps 15 digits, and different ids merge.",
}
_UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
_EARLIEST, _LATEST = 5 * 10**8, 5 * 10**9
"""Seconds since 1970 that may be meant as a moment: 1985 to 2128. Numbers that all lie outside, in every unit, are counters."""
_TOLERANCE = 86_400


def check_rows(connection: duckdb.DuckDBPyConnection, names: list[str], locate: Locate) -> None:
    """Refuse rows of ``raw`` without a user, an item or a time, and ids that cannot be meant.

    Raises:
        DataError: with the first such row.
    """
    kinds = {row[0]: row[1] for row in connection.execute("DESCRIBE raw").fetchall()}
    for column, name in zip(("user_id", "item_id", "time"), names):
        is_text = kinds[column] == "VARCHAR"
        wrong = (
            _WRONG_IDS
            if is_text and column != "time"
            else {"is empty": "({0} IS NULL)" if not is_text else EMPTY}
        )
        firsts = ", ".join(
            f"min(row_number) FILTER ({condition.format(column)})" for condition in wrong.values()
        )
        for reason, row in zip(wrong, one(connection, f"SELECT {firsts} FROM raw")):
            if row is not None:
                raise DataError(
                    f"{locate(row)}: `{name}` {reason}.",
                    rule="Every row needs a user, an item and a time.",
                    remedy=_REMEDIES.get(reason, "Complete or remove that row."),
                )
        if is_text and column != "time":
            _check_one_kind(connection, column, name, locate)


def _check_one_kind(
    connection: duckdb.DuckDBPyConnection, column: str, name: str, locate: Locate
) -> None:
    """Refuse a column that writes whole numbers in two ways: `7` and `7.0` would be two users."""
    whole, pointed = (
        f"min(row_number) FILTER (regexp_full_match({column}, '{p}'))"
        for p in ("-?[0-9]+", "-?[0-9]+\\.0+")
    )
    first, other = one(connection, f"SELECT {whole}, {pointed} FROM raw")
    if first is not None and other is not None:
        raise DataError(
            f"{locate(max(first, other))}: `{name}` is of mixed types: a number with a point and, "
            f"in {locate(min(first, other))}, one without, or the other way round.",
            rule="An id is compared as text, so 7 and 7.0 would be different ones.",
            remedy="Write the whole column in one way.",
        )


def check_times(
    connection: duckdb.DuckDBPyConnection, kind: str, name: str, locate: Locate
) -> None:
    """Refuse times of mixed units and times in the future, where they are moments at all.

    Raises:
        DataError: with the first row of the rarer unit, the first in the future, or the first number that is of no unit.
    """
    units = {"microseconds": _UNITS["microseconds"]} if kind == "dates" else _UNITS
    inside = {
        unit: f"timestamp >= {_EARLIEST * scale} AND timestamp < {_LATEST * scale}"
        for unit, scale in units.items()
    }
    fields = ", ".join(
        f"count(*) FILTER ({c}), min(row_number) FILTER ({c})" for c in inside.values()
    )
    values = one(connection, f"SELECT {fields} FROM interactions")
    found = {
        unit: (values[2 * i], values[2 * i + 1]) for i, unit in enumerate(inside) if values[2 * i]
    }
    if len(found) > 1:
        usual, *_, rare = sorted(found, key=lambda unit: (-found[unit][0], found[unit][1]))
        raise DataError(
            f"{locate(found[rare][1])}: the time in column `{name}` is in {rare}, but most are in {usual}.",
            rule="All times have one unit.",
            remedy="Convert them; or, if these numbers are no moments, prepare with times=any.",
        )
    for unit in found:
        limit = int((time.time() + _TOLERANCE) * units[unit])
        row, value = one(
            connection,
            f"SELECT min(row_number), arg_min(timestamp, row_number) FROM interactions WHERE timestamp > {limit}",
        )
        if row is not None:
            raise DataError(
                f"{locate(row)}: the time in column `{name}` is {_moment(float(value) / units[unit])}, in the future.",
                rule="Interactions have happened already; a future time would move every split.",
                remedy="Correct or remove that row; or, if these numbers are no moments, prepare with times=any.",
            )
    for unit in (
        found if kind != "dates" else ()
    ):  # a date says itself what it means, and may be older
        row, value = one(
            connection,
            "SELECT min(row_number), CAST(arg_min(timestamp, row_number) AS VARCHAR) FROM interactions "
            f"WHERE NOT ({inside[unit]})",
        )
        if row is not None:
            raise DataError(
                f"{locate(row)}: the time in column `{name}` is {time_text(Decimal(value))}, but others are moments in {unit}.",
                rule="Moments lie between 1985 and 2128, and all times have one unit.",
                remedy="Correct or remove that row; or, if these numbers are no moments, prepare with times=any.",
            )


def _moment(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError, OSError):
        return f"{seconds:.0f} s after 1970"
