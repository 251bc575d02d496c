"""Text with a delimiter between fields, with or without a line of column names."""

from __future__ import annotations

import csv
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from typing import TextIO

import duckdb

from mltfr_dist.data.sources.formats import Format
from mltfr_dist.data.sources.inputs import InputFile
from mltfr_dist.data.sources.readers import (
    Scan,
    constants,
    csv_options,
    no_rows,
    open_text,
    path_literal,
    quote_text,
    refuse_rejects,
    unreadable,
    value_sql,
)
from mltfr_dist.errors import DataError
from mltfr_dist.schema import or_nearest

_NUMBER = r"[+-]?[0-9]+([.,][0-9]+)?([eE][+-]?[0-9]+)?"
_DATE = r"[0-9]{1,4}[-/.][0-9]{1,2}[-/.][0-9]{1,4}([T ].*)?"
_DELIMITERS = {"::": "'::'", "\t": "'\\t'", ";": "';'", "|": "'|'", ",": "','", " ": "' '"}
_OPTIONS = "--user-column, --item-column or --time-column"
_TITLE_OPTIONS = "--titles-item-column or --titles-title-column"


def open_delimited(
    connection: duckdb.DuckDBPyConnection,
    file: InputFile,
    layout: Format,
    columns: list[str],
    aliases: list[str],
) -> Scan:
    """Find ``columns`` in the header, or by number, and make ready to read them as ``aliases``.

    Raises:
        DataError: no rows, or a column that is missing, or there twice.
    """
    try:
        with open_text(file, layout.encoding) as handle:
            handle = _behind(handle, layout.skip_rows)
            opened = _Records(handle, layout)
            first: list[str] | None = next(
                (record for record in opened if any(field.strip() for field in record)), None
            )
            lines = layout.skip_rows + opened.line_number
            second: list[str] | None = next((record for record in opened if record), None)
    except csv.Error as error:
        raise unreadable(file, "delimited text", error) from None
    if not first:
        raise no_rows(file)
    skipped = lines if layout.header else layout.skip_rows
    given = constants(file, first if layout.header else [])
    own = [name for name in columns if name not in given]
    if layout.header:
        indices = [column_index(file, name, first, titles="title" in aliases) for name in own]
        _refuse_row_as_header(file, layout, first, indices)
    else:
        indices = [_number(file, name, len(first), first, layout) for name in own]
        _refuse_header_as_row(file, layout, first, second, indices)
    rejects = f"rejects_{aliases[-1]}"
    values = given | {name: f"c{index}" for name, index in zip(own, indices)}
    fields = [
        f"{value_sql(values[name], layout.null)} AS {alias}"
        for name, alias in zip(columns, aliases)
    ]
    # row_number() OVER () streams: DuckDB reads in file order and keeps that order.
    sql = (
        f"SELECT row_number() OVER () AS row_number, {', '.join(fields)} FROM "
        f"read_csv({path_literal(file)}, {_reader_options(layout, len(first), skipped)}, "
        f"{csv_options(rejects)})"
    )

    def where(row: int) -> str:
        with open_text(file, layout.encoding) as handle:
            records = _Records(_behind(handle, skipped), layout)
            rows = (record for record in records if record)
            next(itertools.islice(rows, row - 1, None), None)
            return f"{file.name}, line {skipped + records.line_number}"

    return Scan(sql, columns, where, finish=lambda: refuse_rejects(connection, file, rejects))


def _reader_options(layout: Format, num_columns: int, skipped: int) -> str:
    columns = ", ".join(f"'c{index}': 'VARCHAR'" for index in range(num_columns))
    quote = quote_text(layout.quote)
    encoding = "" if layout.encoding == "utf-8" else f", encoding='{layout.encoding}'"
    return (
        f"delim={quote_text(layout.delimiter)}, quote={quote}, escape={quote}, header=false, "
        f"skip={skipped}, columns={{{columns}}}{encoding}"
    )


def _behind(handle: TextIO, lines: int) -> TextIO:
    """The file behind its first ``lines``."""
    for _ in itertools.islice(handle, lines):
        pass
    return handle


class _Records(Iterator[list[str]]):
    """The fields of each record, as DuckDB cuts them; ``line_number``: of the last line read."""

    def __init__(self, handle: TextIO, layout: Format) -> None:
        self.line_number = 0
        self._delimiter = layout.delimiter
        csv.field_size_limit(64_000_000)
        self._reader = None
        if len(layout.delimiter) == 1:
            self._reader = (
                csv.reader(handle, delimiter=layout.delimiter, quotechar=layout.quote)
                if layout.quote
                else csv.reader(handle, delimiter=layout.delimiter, quoting=csv.QUOTE_NONE)
            )
        self._handle = handle

    def __next__(self) -> list[str]:
        if self._reader is not None:
            record = next(self._reader)
            self.line_number = self._reader.line_num
            return record
        line = next(self._handle).rstrip("\r\n")
        self.line_number += 1
        return line.split(self._delimiter) if line else []


def column_index(file: InputFile, name: str, header: list[str], *, titles: bool = False) -> int:
    """Where ``name`` is among the columns; RecBole's `name:type` counts as `name`.

    Raises:
        DataError: it is not there, or twice, or (RecBole) holds lists.
    """
    for names in (header, [column.partition(":")[0] for column in header]):
        times = Counter(names)[name]
        if times > 1:
            raise DataError(
                f"{file.name} has {times} columns `{name}`.",
                rule="Which of them is meant cannot be known.",
                remedy="Rename or remove one of them.",
            )
        is_list = times and header[names.index(name)].endswith(":token_seq")
        if is_list and not titles and name not in header:
            raise DataError(
                f"{file.name}: the column `{header[names.index(name)]}` holds lists.",
                rule="Each row is one interaction here.",
                remedy="For one row a user with a list of items: --format recbole-sequences.",
            )
        if times:
            return names.index(name)
    shown = ", ".join(f"`{column[:40]}`" for column in header[:30])
    raise DataError(
        f"{file.name} has no column `{name}`; its columns are {shown}{or_nearest(name, header)}.",
        remedy=_column_remedy(header, titles),
    )


def _column_remedy(header: list[str], titles: bool) -> str:
    if not titles and len(header) == 1:
        delimiters = [typed for mark, typed in _DELIMITERS.items() if mark in header[0]]
        if delimiters:
            return f"If fields are divided by another character: --delimiter {delimiters[0]}."
    if not titles and any(_is_value(cell) for cell in header):
        return f"If the first line is a row and no header: {_no_header(header)}."
    return f"Name it with {_TITLE_OPTIONS if titles else _OPTIONS}."


def _no_header(first: list[str]) -> str:
    """Options to read a file whose first line is ``first``; the time is what looks like one."""
    moments = [i for i, cell in enumerate(first) if re.fullmatch(r"[0-9]{9,19}(\.[0-9]+)?", cell)]
    dates = [i for i, cell in enumerate(first) if re.fullmatch(_DATE, cell)]
    time = (dates or moments or [-1])[-1]
    user, item = ([i for i in range(len(first)) if i != time] + [0, 1])[:2]
    columns = f"--no-header --user-column {user + 1} --item-column {item + 1}"
    if time < 0:
        return f"{columns} --order file (or --time-column with the number of the time)"
    return f"{columns} --time-column {time + 1} (counted from 1; say which is which)"


def _is_value(cell: str) -> bool:
    return bool(re.fullmatch(_NUMBER, cell.strip()) or re.fullmatch(_DATE, cell.strip()))


def _refuse_row_as_header(
    file: InputFile, layout: Format, header: list[str], indices: list[int]
) -> None:
    """A first line of numbers and dates is a row; but pandas writes 0, 1, 2 for no names."""
    if header == [str(index) for index in range(len(header))]:
        return
    for index in indices:
        if _is_value(header[index]):
            raise DataError(
                f"{file.name}: the column name `{header[index]}` looks like a value, so its first "
                "line seems to be a row.",
                rule="The first line of csv and tsv names the columns; a row there would be lost.",
                remedy=f"Without a header: {_no_header(header)}. If it is one, rename the columns.",
            )


def _refuse_header_as_row(
    file: InputFile,
    layout: Format,
    first: list[str],
    second: list[str] | None,
    indices: list[int],
) -> None:
    """With --no-header: a first line of names above numbers is a header, and would become a row."""
    if second is None or len(second) != len(first):
        return
    above, below = ([row[index].strip() for index in indices] for row in (first, second))
    if all(map(_is_value, below)) and not any(map(_is_value, above)) and all(above):
        raise DataError(
            f"{file.name}, line {layout.skip_rows + 1}: `{', '.join(above)}` looks like column "
            f"names, above `{', '.join(below)}`.",
            rule="With --no-header the first line is a row.",
            remedy="Leave --no-header out and name the columns, or --skip-rows 1.",
        )


def _number(file: InputFile, name: str, count: int, first: list[str], layout: Format) -> int:
    if name.isdecimal() and name.isascii() and 1 <= int(name) <= count:
        return int(name) - 1
    remedy = f"Give each of {_OPTIONS} as a number, from 1: {_no_header(first)}."
    if count == 1:
        delimiters = [typed for mark, typed in _DELIMITERS.items() if mark in first[0]]
        remedy = (
            f"Divide the fields by another character: --delimiter {delimiters[0]}."
            if delimiters
            else remedy
        )
    raise DataError(
        f"{file.name} has no column `{name}`: without a header, its columns are 1 to {count}.",
        rule=f"The first line is `{layout.delimiter.join(first)[:120]}`.",
        remedy=remedy,
    )
