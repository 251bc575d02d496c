"""Ids that can be read and are wrong all the same, found before any work is done on them.

Checks look at each distinct id once, with the first row that has it.
"""

from __future__ import annotations

import re
import unicodedata

import duckdb
import pyarrow as pa

from mltfr_dist.data.sources.readers import EMPTY, one
from mltfr_dist.data.sources.times import Locate
from mltfr_dist.errors import DataError

_NULL_NAMES = (
    "none|null|nil|na|n/a|#n/a|<na>|nat|\\\\n|undefined|<null>|\\(null\\)|[+-]?(nan|inf(inity)?)"
)
_CONTROL = "holds a tab, a line end or another control character"
_ROUNDED = "is a rounded number"
_NULL = "means a missing value"
_WRONG_ALWAYS = {
    "is empty": EMPTY,
    _CONTROL: (
        "regexp_matches({0}, '[\\x00-\\x1F\\x7F-\\x{{9F}}\\x{{2028}}\\x{{2029}}\\x{{FEFF}}]')"
    ),
}
_WRONG_MOSTLY = {
    "is NaN": "regexp_full_match(trim({0}), '[+-]?(nan|inf(inity)?)', 'i')",
    _NULL: f"regexp_full_match(trim({{0}}), '{_NULL_NAMES}', 'i')",
    _ROUNDED: (
        "regexp_full_match(trim({0}), '[+-]?([0-9](\\.[0-9]+)?[eE]\\+?[0-9]+|[0-9]{{16,}}\\.0+)')"
    ),
}
_REMEDIES = {
    _CONTROL: "Replace it in that id, or remove that row.",
    _ROUNDED: "Write ids as text or whole numbers: floating point keeps 15 digits, and different "
    "ids merge. Where it is an id as it stands: --ids any.",
}
_AS_MISSING = (
    "Leave such rows out with --null '{value}' --missing drop; or, where it is an id as it stands, "
    "--ids any."
)
_INVISIBLE = dict.fromkeys(
    [
        0x00AD,
        0x034F,
        0x061C,
        0x180E,
        *range(0x200B, 0x2010),
        *range(0x202A, 0x202F),
        *range(0x2060, 0x2065),
        *range(0xFE00, 0xFE10),
    ]
)
_WHOLE = re.compile(r"([+-]?)0*([0-9]+)")


def check_ids(
    connection: duckdb.DuckDBPyConnection, column: str, name: str, locate: Locate, *, strict: bool
) -> None:
    """Refuse ids of ``interactions`` that cannot be meant, or are one id written in two ways.

    Args:
        connection: holds ``interactions``.
        column: user_id or item_id, of text.
        name: what the user calls it.
        locate: where a row is.
        strict: not only what can be no id in any case (--ids checked).

    Raises:
        DataError: with the first such row.
    """
    connection.execute(
        f"CREATE OR REPLACE TABLE ids AS SELECT {column} AS id, min(row_number) AS row "
        f"FROM interactions GROUP BY {column}"
    )
    wrong = _WRONG_ALWAYS | (_WRONG_MOSTLY if strict else {})
    firsts = ", ".join(f"min(row) FILTER ({rule.format('id')})" for rule in wrong.values())
    for reason, row in zip(wrong, one(connection, f"SELECT {firsts} FROM ids")):
        if row is not None:
            raise _wrong_id(connection, row, reason, name, locate)
    if strict:
        _check_one_kind(connection, name, locate)
        _refuse_booleans(connection, name, locate)
        _refuse_twins(connection, name, locate)
    connection.execute("DROP TABLE ids")


def missing(name: str, where: str) -> DataError:
    """The error for a row without a user, an item or a time."""
    return DataError(
        f"{where}: `{name}` is empty.",
        rule="Every row needs a user, an item and a time.",
        remedy="Complete or remove that row, or leave out all such rows with --missing drop.",
    )


def _wrong_id(
    connection: duckdb.DuckDBPyConnection, row: int, reason: str, name: str, locate: Locate
) -> DataError:
    value = one(connection, "SELECT id FROM ids WHERE row = $1", [row])[0]
    if reason == "is empty":
        return missing(name, locate(row))
    shown = f"is `{value}`, which {reason}" if reason == _NULL else reason
    remedy = _REMEDIES.get(reason, _AS_MISSING.format(value=value))
    return DataError(
        f"{locate(row)}: `{name}` {shown}.",
        rule="Every row needs a user, an item and a time.",
        remedy=remedy,
    )


def _check_one_kind(connection: duckdb.DuckDBPyConnection, name: str, locate: Locate) -> None:
    """Refuse a column that writes whole numbers in two ways: `7` and `7.0` would be two users."""
    whole, pointed = (
        f"min(row) FILTER (regexp_full_match(id, '{pattern}'))"
        for pattern in ("-?[0-9]+", "-?[0-9]+\\.0+")
    )
    first, other = one(connection, f"SELECT {whole}, {pointed} FROM ids")
    if first is not None and other is not None:
        raise DataError(
            f"{locate(max(first, other))}: `{name}` is of mixed types: a number with a point and, "
            f"in {locate(min(first, other))}, one without, or the other way round.",
            rule="An id is compared as text, so 7 and 7.0 would be different ones.",
            remedy="Write the whole column in one way.",
        )


def _refuse_booleans(connection: duckdb.DuckDBPyConnection, name: str, locate: Locate) -> None:
    """Refuse a column of nothing but true and false: it is another than was meant."""
    others, first = one(
        connection,
        "SELECT count(*) FILTER (lower(trim(id)) NOT IN ('true', 'false')), min(row) FROM ids",
    )
    if not others:
        raise DataError(
            f"{locate(first)}: `{name}` is true or false in every row.",
            rule="An id tells users, or items, apart.",
            remedy="Name the right column; or, if these are ids, --ids any.",
        )


def _refuse_twins(connection: duckdb.DuckDBPyConnection, name: str, locate: Locate) -> None:
    """Refuse ids that are the same but for blanks, zeros in front, or how letters are encoded."""
    odd = connection.execute(
        "SELECT id, row FROM ids WHERE "
        "regexp_matches(id, '^ | $|^[+-]?0+[0-9]+$|^[+-]|[^\\x00-\\x7F]')"
    )
    plain: list[tuple[str, str, int]] = []
    while batch := odd.fetchmany(100_000):
        plain += [(normal, id, row) for id, row in batch if (normal := _plain(id)) != id]
    if not plain:
        return
    normals, others, rows = zip(*plain)
    connection.register(
        "plain",
        pa.table({"normal": normals, "id": others, "row": rows}),
    )
    twins = connection.execute(
        "WITH pairs AS (SELECT plain.id AS id, plain.row AS row, ids.id AS other, "
        "ids.row AS other_row FROM plain JOIN ids ON plain.normal = ids.id "
        "UNION ALL SELECT a.id, a.row, b.id, b.row FROM plain a JOIN plain b ON a.normal = "
        "b.normal AND a.id <> b.id) "
        "SELECT * FROM pairs ORDER BY greatest(row, other_row), row LIMIT 1"
    ).fetchall()
    connection.unregister("plain")
    for id, row, other, other_row in twins:
        raise DataError(
            f"{locate(row)}: `{name}` is {id!a}, and {other!a} in {locate(other_row)}.",
            rule="Ids that differ only in blanks around them, zeros or a sign in front, or "
            "characters that look alike are mostly one user, or item, written in two ways.",
            remedy="Write them in one way; or, if they are different ones, --ids any.",
        )


def _plain(id: str) -> str:
    """``id`` without what makes no visible or numeric difference."""
    text = unicodedata.normalize("NFKC", id.translate(_INVISIBLE)).strip()
    number = _WHOLE.fullmatch(text)
    if number and text.isascii():
        sign = "-" if number[1] == "-" and number[2] != "0" else ""
        return sign + number[2]
    return text
