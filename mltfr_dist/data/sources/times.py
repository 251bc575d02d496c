"""What times mean: their kinds, how each is understood, and which are refused all the same.

A source has one kind: ``integers`` (Parquet's), ``numbers`` (text or floating point, as
DECIMAL(38, 9)), ``dates``, ``pattern`` (--time-format) and ``moments`` (Parquet's) as microseconds
since 1970 UTC, or ``order`` (no times but positions).
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal

import duckdb

from mltfr_dist.data.sources.readers import one, quote_text
from mltfr_dist.errors import ConfigError, DataError

Locate = Callable[[int], str]
"""From a row number to `file, line N`."""

_UNITS = {"seconds": 1, "milliseconds": 10**3, "microseconds": 10**6, "nanoseconds": 10**9}
_EARLIEST, _LATEST = 5 * 10**8, 5 * 10**9
"""Seconds since 1970 that may be meant as a moment: 1985 to 2128.

Numbers that all lie outside, in every unit, are counters.
"""
_TOLERANCE = 86_400
_DECIMAL = "DECIMAL(38, 9)"
# An exponent may have been rounded (a spreadsheet's 1.7E+09); a leading zero is part of a date.
_NUMBER = r"\s*[+-]?(0|[1-9][0-9]*)?(\.[0-9]{0,9}0*)?\s*"
_DATE = (
    r"\s*[0-9]{4}(-[0-9]{1,2}-|/[0-9]{1,2}/)[0-9]{1,2}"
    r"([T ][0-9]{1,2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6}0*)?)?"
    r"(Z| ?(UTC|GMT)|[+-][0-9]{2}(:?[0-9]{2})?)?)?\s*"
)
_DATES = ("%Y-%m-%d", "%Y/%m/%d", "%d/%m/%Y", "%m/%d/%Y", "%d.%m.%Y", "%d-%m-%Y", "%m-%d-%Y")
_SHORT_DATES = ("%y-%m-%d", "%d-%m-%y", "%m-%d-%y", "%d/%m/%y", "%m/%d/%y", "%d.%m.%y")
_CLOCKS = ("", " %H:%M:%S", " %H:%M", " %I:%M:%S %p", " %I:%M %p", "T%H:%M:%S", " %H:%M:%S.%f")
_WORDS = (
    "%a %b %d %H:%M:%S %z %Y",
    "%a %b %d %H:%M:%S %Y",
    "%a, %d %b %Y %H:%M:%S %z",
    "%a, %d %b %Y %H:%M:%S %Z",
    "%d/%b/%Y:%H:%M:%S %z",
    "%d %b %Y",
    "%b %d, %Y",
    "%B %d, %Y",
    "%d %B %Y",
    "%m %d, %Y",
    "%Y%m%d",
    "%d%m%Y",
    "%m%d%Y",
    "%Y%m%d%H%M%S",
)


def check_pattern(connection: duckdb.DuckDBPyConnection, pattern: str) -> None:
    """Refuse a --time-format that cannot tell moments apart, before anything is read.

    Raises:
        ConfigError: DuckDB does not know it, or it has no year or no half of the day.
    """
    reason = ""
    try:
        connection.execute(f"SELECT try_strptime('', {quote_text(pattern)})").fetchall()
    except duckdb.Error as error:
        reason = str(error).splitlines()[0]
    fields = set(re.findall(r"%-?([A-Za-z])", pattern.replace("%%", "")))
    if not reason and not fields & set("YyGcxD"):
        reason = "it has no year (%Y or %y)"
    if not reason and fields & set("I") and not fields & set("pP"):
        reason = "%I counts to 12 and needs %p"
    if not reason and "n" in fields:
        reason = "%n is finer than a microsecond; %f is the finest"
    if reason:
        raise ConfigError(
            f"--time-format '{pattern}' cannot be used: {reason}.",
            rule="It is a pattern of strptime, as '%d/%m/%Y %H:%M:%S'.",
            remedy="Correct it.",
        )


def text_kind(value: str) -> str:
    """Which kind times are that come as text, by the first; all others must be of it, too."""
    is_number = re.fullmatch(_NUMBER, value) and re.search("[0-9]", value)
    return "numbers" if is_number else "dates"


def time_sql(kind: str, pattern: str | None, *, is_text: bool) -> str:
    """SQL from the column ``time`` to a number; NULL where it is not of its kind.

    Args:
        kind: of the source.
        pattern: --time-format, for the kind ``pattern``.
        is_text: times were text in the file, not floating point, where an exponent is no rounding.
    """
    if kind == "pattern":
        parsed = f"try_strptime(CAST(time AS VARCHAR), {quote_text(str(pattern))})"
        return f"CAST(epoch_us({parsed}) AS {_DECIMAL})"
    if kind == "numbers" and not is_text:
        return f"TRY_CAST(time AS {_DECIMAL})"
    if kind == "numbers":
        whole = "TRY_CAST(time AS BIGINT)"  # most times: equal to what it is written as again
        return (
            f"CASE WHEN CAST({whole} AS VARCHAR) = time THEN CAST({whole} AS {_DECIMAL}) "
            f"WHEN regexp_full_match(time, '{_NUMBER}') THEN TRY_CAST(time AS {_DECIMAL}) END"
        )
    if kind == "dates":
        moment = f"CAST(epoch_us(TRY_CAST(time AS TIMESTAMPTZ)) AS {_DECIMAL})"
        return f"CASE WHEN regexp_full_match(time, '{_DATE}') THEN {moment} END"
    return "time"


def suggested(connection: duckdb.DuckDBPyConnection, value: str) -> list[str]:
    """The patterns that ``value`` can be read by, with a plausible moment."""
    dates = [date + clock for date, clock in itertools.product((*_DATES, *_SHORT_DATES), _CLOCKS)]
    zoned = [f"{date}{zone}" for date in dates if ":" in date for zone in (" %z", "%z", " %Z")]
    patterns = (*dates, *zoned, *_WORDS)
    text = quote_text(value.strip())
    parsed = [f"epoch_us(try_strptime({text}, {quote_text(pattern)}))" for pattern in patterns]
    latest = (time.time() + _TOLERANCE) * 1e6
    return [
        pattern
        for pattern, micros in zip(patterns, one(connection, f"SELECT {', '.join(parsed)}"))
        if micros is not None and _EARLIEST * 1e6 <= micros < latest
    ]


def bad_time(
    connection: duckdb.DuckDBPyConnection,
    where: str,
    column: str,
    value: str,
    kind: str,
    pattern: str | None,
    *,
    is_first: bool,
) -> DataError:
    """The error for a time that is not of its source's kind."""
    wanted = {
        "dates": "a date or date-time that begins with a four-digit year, as in the first row",
        "numbers": "a number, as in the first row",
        "pattern": f"of --time-format '{pattern}'",
    }[kind]
    if is_first and kind == "dates":
        wanted = "a number, date or date-time that begins with a four-digit year"
    patterns = [] if kind == "pattern" else suggested(connection, value)
    remedy = "Correct or remove that row."
    if patterns:
        choices = " or ".join(f"--time-format '{each}'" for each in patterns[:3])
        ambiguous = (
            "Which of them is meant cannot be known: give " if len(patterns) > 1 else "Give "
        )
        remedy = f"{ambiguous}{choices}; or correct or remove that row."
    elif is_first:
        remedy += " For other ways to write times, --time-format."
    return DataError(
        f"{where}: the time `{value}` in column `{column}` is not {wanted}.",
        rule="All times are numbers (without exponent, at most 9 decimals), or all are dates "
        "(2024-05-31) or date-times (2024-05-31 10:00:00, to the microsecond; Z, UTC or +02:00).",
        remedy=remedy,
    )


def check_times(
    connection: duckdb.DuckDBPyConnection, kind: str, name: str, locate: Locate
) -> None:
    """Refuse times of mixed units and times in the future, where they are moments at all.

    Raises:
        DataError: with the first row of the rarer unit, in the future, or of no unit.
    """
    is_number = kind in ("integers", "numbers")
    units = _UNITS if is_number else {"microseconds": _UNITS["microseconds"]}
    inside = {
        unit: f"timestamp >= {_EARLIEST * scale} AND timestamp < {_LATEST * scale}"
        for unit, scale in units.items()
    }
    fields = ", ".join(
        f"count(*) FILTER ({c}), min(row_number) FILTER ({c})" for c in inside.values()
    )
    values = one(connection, f"SELECT {fields} FROM interactions")
    units_seen = {
        unit: (values[2 * i], values[2 * i + 1]) for i, unit in enumerate(inside) if values[2 * i]
    }
    if len(units_seen) > 1:
        usual, *_, rare = sorted(
            units_seen, key=lambda unit: (-units_seen[unit][0], units_seen[unit][1])
        )
        raise DataError(
            f"{locate(units_seen[rare][1])}: the time in column `{name}` is in {rare}, but most "
            f"are in {usual}.",
            rule="All times have one unit.",
            remedy="Convert them; or, if these numbers are no moments, --times any.",
        )
    if not units_seen and is_number:
        _refuse_day_first(connection, name, locate)
    for unit in units_seen or (units if not is_number else ()):
        _refuse_future(connection, units[unit], name, locate)
        _refuse_outside(connection, inside[unit], unit, name, locate, is_number=is_number)


def _refuse_future(
    connection: duckdb.DuckDBPyConnection, scale: int, name: str, locate: Locate
) -> None:
    limit = int((time.time() + _TOLERANCE) * scale)
    row, value = one(
        connection,
        "SELECT min(row_number), arg_min(timestamp, row_number) FROM interactions "
        f"WHERE timestamp > {limit}",
    )
    if row is not None:
        raise DataError(
            f"{locate(row)}: the time in column `{name}` is {_moment(float(value) / scale)}, "
            "in the future.",
            rule="Interactions have happened already; a future time would move every split.",
            remedy="Correct or remove that row; or, if these are no moments, --times any.",
        )


def _refuse_outside(
    connection: duckdb.DuckDBPyConnection,
    inside: str,
    unit: str,
    name: str,
    locate: Locate,
    *,
    is_number: bool,
) -> None:
    row, value = one(
        connection,
        "SELECT min(row_number), CAST(arg_min(timestamp, row_number) AS VARCHAR) "
        f"FROM interactions WHERE NOT ({inside})",
    )
    if row is None:
        return
    if is_number:
        what = f"{time_text(Decimal(value))}, but others are moments in {unit}"
    else:
        what = f"{_moment(float(value) / _UNITS['microseconds'])}, which is before 1985"
    raise DataError(
        f"{locate(row)}: the time in column `{name}` is {what}.",
        rule="Moments lie between 1985 and 2128, and all times have one unit.",
        remedy="Correct or remove that row; or, if these times are right as they are, --times any.",
    )


def _refuse_day_first(connection: duckdb.DuckDBPyConnection, name: str, locate: Locate) -> None:
    """Refuse numbers that all read as DDMMYYYY or MMDDYYYY: they do not order as they stand."""
    year = "CAST(timestamp AS BIGINT) % 10000 BETWEEN 1985 AND 2127"
    day_month = "(CAST(timestamp AS BIGINT) // 1000000, CAST(timestamp AS BIGINT) // 10000 % 100)"
    is_date = (
        f"timestamp BETWEEN 1011985 AND 31122127 AND {year} AND {day_month}[1] BETWEEN 1 AND 31 "
        f"AND {day_month}[2] BETWEEN 1 AND 31 AND least({day_month}[1], {day_month}[2]) <= 12"
    )
    others, first = one(
        connection,
        f"SELECT count(*) FILTER (NOT coalesce({is_date}, false)), min(row_number) "
        "FROM interactions",
    )
    if not others:
        raise DataError(
            f"{locate(first)}: the time in column `{name}`, like all others, looks like a date "
            "whose year comes last.",
            rule="Numbers are ordered by size, which is not the order of such dates.",
            remedy="Give --time-format '%d%m%Y' or --time-format '%m%d%Y'; or, if these are no "
            "dates, --times any.",
        )


def _moment(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M} UTC"
    except (ValueError, OverflowError, OSError):
        return f"{seconds:.0f} s after 1970"


def time_text(time: Decimal) -> str:
    """A time without the zeros that DECIMAL(38, 9) adds."""
    text = f"{time:f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
