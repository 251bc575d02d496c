"""Sequence text that is none: logs with one line a user, whose times would become items."""

from __future__ import annotations

import re

import duckdb

from mltfr_dist.data.sources.formats import NAMED
from mltfr_dist.data.sources.inputs import InputFile
from mltfr_dist.data.sources.layouts import head, recognise
from mltfr_dist.data.sources.readers import one
from mltfr_dist.errors import DataError

_MOMENT = (
    r"(5|6|7|8|9)[0-9]{8}|[1-4][0-9]{9}|[5-9][0-9]{11}|[1-4][0-9]{12}|"
    r"[0-9]{4}[-/][0-9]{1,2}[-/][0-9]{1,2}([T ].*)?|[0-9]{1,2}/[0-9]{1,2}/[0-9]{2,4}"
)
"""Seconds from 1985 on, milliseconds, and dates."""
_RULE = "Every field behind the first is an item in sequence text."
_RATING = r"([0-9]|10)(\.[0-9]+)?"
_FIRST_OF_LOG, _LAST_OF_LOG = 3, 8
"""Least and most fields of the lines of such a log."""


def refuse_log(connection: duckdb.DuckDBPyConnection, file: InputFile) -> None:
    """Refuse ``fields(line_number, fields)`` where each line looks like one interaction.

    Real sequences of one length hold items of one kind in all positions; a log does not.

    Raises:
        DataError: with the position of the times or ratings, and how such a file is read.
    """
    looks = recognise(file)
    if looks not in (None, "pairs"):
        raise DataError(
            f"{file.name} is no sequence text: it looks like {looks} ({NAMED[str(looks)].title}).",
            rule=_RULE,
            remedy=f"Read it with --format {looks}; or, if all these are items, --times any.",
        )
    least, most, lines = one(
        connection, "SELECT min(len(fields)), max(len(fields)), count(*) FROM fields"
    )
    if least != most or not _FIRST_OF_LOG <= least <= _LAST_OF_LOG:
        return
    names = "line_number > (SELECT min(line_number) FROM fields)" if lines > 2 else "true"
    indices = range(2, least + 1)
    counts = one(
        connection,
        "SELECT "
        + ", ".join(
            f"count(*) FILTER (regexp_full_match(fields[{index}], '{pattern}'))"
            for pattern in (_MOMENT, _RATING)
            for index in indices
        )
        + f", count(*) FROM fields WHERE {names}",
    )
    total, width = counts[-1], len(indices)
    moments = [index for index, count in zip(indices, counts[:width]) if count == total]
    ratings = [index for index, count in zip(indices, counts[width:-1]) if count == total]
    what = "times" if moments and len(moments) < width else ""
    index = moments[-1] if moments else 0
    if not what and lines > 2 and least == 3 and ratings == [3]:
        what, index = "ratings", 3
    if what:
        raise DataError(
            f"{file.name}: each line has {least} fields, and field {index} of all is like one of "
            f"{what}, not an item: this looks like a log with one interaction a line.",
            rule=_RULE,
            remedy=f"Read it with {_as_log(file, index, what)}; or, if these are items, "
            "--times any.",
        )


def _as_log(file: InputFile, index: int, what: str) -> str:
    """The options that read such a log; a first line without a time (a rating) is its header."""
    first = head(file)[0]
    tabbed = "\t" in first
    fields = first.split("\t") if tabbed else first.split(" ")
    pattern = _MOMENT if what == "times" else _RATING
    has_header = not re.fullmatch(pattern, fields[index - 1])
    names = fields if has_header else [str(number) for number in range(1, len(fields) + 1)]
    others = [name for number, name in enumerate(names, 1) if number != index][:2]
    text = "--format tsv" if tabbed else "--format csv --delimiter ' '"
    header = "" if has_header else " --no-header"
    order = f"--time-column {names[index - 1]}" if what == "times" else "--order file"
    return f"{text}{header} --user-column {others[0]} --item-column {others[1]} {order}"
