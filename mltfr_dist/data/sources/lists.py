"""Lists of items: a line or a row a user; and `user item` pairs. All become one row an item."""

from __future__ import annotations

import re

import duckdb

from mltfr_dist.data.sources import suspicion
from mltfr_dist.data.sources.delimited import column_index, open_delimited
from mltfr_dist.data.sources.formats import Format
from mltfr_dist.data.sources.inputs import InputFile
from mltfr_dist.data.sources.parquet import column_types, reader, time_value
from mltfr_dist.data.sources.readers import (
    Scan,
    no_rows,
    one,
    open_text,
    read_lines,
    reading,
    value_sql,
)
from mltfr_dist.errors import DataError

_SPLIT = "regexp_split_to_array(trim(line, chr(32) || chr(9)), '[ \\t]+')"
_LIST = r"(?!FLOAT|BOOLEAN|STRUCT|MAP|UNION)[^\[]*\[\]"
_ONE_LINE = "Lists that carry no time are whole histories: one line (or row) a user."


def open_sequences(
    connection: duckdb.DuckDBPyConnection, file: InputFile, layout: Format, *, times_are_items: bool
) -> Scan:
    """Lines `user item item ...`, oldest first; time is the position.

    Args:
        connection: takes the rows.
        file: the file.
        layout: the format, for values that mean a missing one.
        times_are_items: read also what looks like a log with one line a user.

    Raises:
        DataError: a line without items, a user with two lines, or lines that look like a log.
    """
    _split_lines(connection, file)
    lonely = one(connection, "SELECT min(line_number) FROM fields WHERE len(fields) < 2")[0]
    if lonely is not None:
        user = one(connection, "SELECT fields[1] FROM fields WHERE line_number = $1", [lonely])[0]
        raise DataError(
            f"{file.name}, line {lonely}: `{user[:80]}` stands alone.",
            rule="A line of sequence text is a user and at least one item, with blanks between: "
            "`user item item ...`.",
            remedy="Correct or remove that line; for lines with another delimiter, --format csv.",
        )
    if not times_are_items:
        suspicion.refuse_log(connection, file)
    connection.execute(
        "CREATE OR REPLACE TABLE lists AS SELECT line_number, fields[1] AS user_id, "
        "fields[2:] AS items FROM fields"
    )
    connection.execute("DROP TABLE fields")
    _refuse_repeated(connection, file, "line")
    return _expanded(connection, file, layout, ["user", "item"], "line")


def open_pairs(connection: duckdb.DuckDBPyConnection, file: InputFile, layout: Format) -> Scan:
    """Lines `user item` in order of time.

    Raises:
        DataError: a line that has not two fields.
    """
    _split_lines(connection, file)
    bad = one(
        connection,
        "SELECT min(line_number), arg_min(len(fields), line_number) FROM fields "
        "WHERE len(fields) <> 2",
    )
    if bad[0] is not None:
        raise DataError(
            f"{file.name}, line {bad[0]}: there are {bad[1]} fields.",
            rule="Each line of pairs is `user item`, and the lines are in order of time.",
            remedy="Correct or remove that line; for one line a user, --format sequences.",
        )
    user, item = (value_sql(f"fields[{index}]", layout.null) for index in (1, 2))
    connection.execute(
        f"CREATE OR REPLACE TABLE raw AS SELECT row_number() OVER (ORDER BY line_number) AS "
        f"row_number, {user} AS user_id, {item} AS item_id, line_number FROM fields"
    )
    connection.execute("DROP TABLE fields")
    columns = "row_number, user_id, item_id, row_number AS time"
    return _raw(connection, file, ["user", "item"], "line", columns)


def open_list_columns(
    connection: duckdb.DuckDBPyConnection, file: InputFile, layout: Format
) -> Scan:
    """Parquet with one row a user: a list of items, and one of times, or no time.

    Raises:
        DataError: columns that are missing or no lists, or lists of unequal lengths.
    """
    types = column_types(connection, file, layout.columns)
    for column, (_, type) in list(zip(layout.columns, types))[1:]:
        if not re.fullmatch(_LIST, type):
            raise DataError(
                f"{file.name}: the column `{column}` is of type {type}, no list of numbers, texts "
                "or times.",
                rule="parquet-lists has a row a user, with a list of items and one of times; "
                "float32 (FLOAT) would round them.",
                remedy="Name the list with --item-column (and --time-column, or --order file); "
                "for one row an interaction, --format parquet.",
            )
    names = [value for value, _ in types]
    times = f", {names[2]} AS times" if layout.time is not None else ""
    with reading(file, "parquet"):
        connection.execute(
            f"CREATE OR REPLACE TABLE lists AS SELECT file_row_number + 1 AS line_number, "
            f"CAST({names[0]} AS VARCHAR) AS user_id, "
            f"CAST({names[1]} AS VARCHAR[]) AS items{times} FROM {reader(file)}"
        )
    if layout.time is None:
        _refuse_repeated(connection, file, "row")
        return _expanded(connection, file, layout, layout.columns, "row")
    unequal = one(
        connection,
        "SELECT min(line_number) FROM lists "
        "WHERE coalesce(len(items), 0) <> coalesce(len(times), 0)",
    )[0]
    if unequal is not None:
        raise DataError(
            f"{file.name}, row {unequal}: `{layout.item}` and `{layout.time}` are of unequal "
            "length.",
            rule="Each item has its time.",
            remedy="Correct or remove that row.",
        )
    type = types[2][1].removesuffix("[]")
    return _expanded(connection, file, layout, layout.columns, "row", time_value(type))


def open_token_seq(connection: duckdb.DuckDBPyConnection, file: InputFile, layout: Format) -> Scan:
    """RecBole's `item_id_list:token_seq`: a row a user; a column `item_id` is the row's last item.

    Raises:
        DataError: no such column, or a user with several rows.
    """
    columns, aliases = [layout.user], ["user_id"]
    header, items = _token_seq_columns(file, layout)
    columns.append(items)
    aliases.append("items")
    last = "item_id" if f"{items.partition(':')[0]}" == "item_id_list" else ""
    if last and last in [name.partition(":")[0] for name in header]:
        columns.append(last)
        aliases.append("last")
    scan = open_delimited(connection, file, layout, columns, aliases)
    target = "[last]" if "last" in aliases else "[]"
    with reading(file, "tsv"):
        connection.execute(
            "CREATE OR REPLACE TABLE lists AS SELECT row_number AS line_number, user_id, "
            f"list_concat(list_filter(string_split(coalesce(items, ''), ' '), lambda i: i <> ''), "
            f"{target}) AS items FROM ({scan.sql})"
        )
    scan.finish()
    _refuse_repeated(connection, file, "row")
    return _expanded(connection, file, layout, [layout.user, layout.item], "row")


def _token_seq_columns(file: InputFile, layout: Format) -> tuple[list[str], str]:
    with open_text(file) as handle:
        header = handle.readline().rstrip("\r\n").split("\t")
    bare = [name.partition(":")[0] for name in header]
    if layout.item not in bare:
        column_index(file, layout.item, header)
    return header, header[bare.index(layout.item)]


def _split_lines(connection: duckdb.DuckDBPyConnection, file: InputFile) -> None:
    """Create ``fields(line_number, fields)``."""
    read_lines(connection, file)
    connection.execute(
        "CREATE OR REPLACE TABLE fields AS SELECT row_number AS line_number, "
        f"{_SPLIT} AS fields FROM lines"
    )
    connection.execute("DROP TABLE lines")
    if not one(connection, "SELECT count(*) FROM fields")[0]:
        raise no_rows(file)


def _refuse_repeated(connection: duckdb.DuckDBPyConnection, file: InputFile, what: str) -> None:
    repeated = connection.execute(
        "SELECT user_id, min(line_number), max(line_number), max(len(items)) FROM lists "
        "GROUP BY user_id HAVING count(*) > 1 ORDER BY 3 LIMIT 1"
    ).fetchall()
    for user, before, line, longest in repeated:
        remedy = (
            "Join the user's lines, oldest first; or keep the longest, if each repeats the one "
            "before."
        )
        if longest <= 1:
            remedy = "For lines `user item` in order of time: --format pairs."
        elif what == "line":
            remedy = (
                "Join the user's lines; or, for a log with one interaction a line: --format csv "
                "--delimiter ' ' --no-header --user-column 1 --item-column 2 --time-column 4 "
                "(tsv, if tabs divide the fields)."
            )
        raise DataError(
            f"{file.name}, {what} {line}: the user `{user}` was on {what} {before} already.",
            rule=_ONE_LINE,
            remedy=remedy,
        )


def _expanded(
    connection: duckdb.DuckDBPyConnection,
    file: InputFile,
    layout: Format,
    names: list[str],
    what: str,
    time: tuple[str, str] | None = None,
) -> Scan:
    """``lists`` -> ``raw``, a row an item; ``time``: SQL and kind of each, None: the position."""
    times = ", unnest(times) AS time" if time else ""
    user, item = (value_sql(column, layout.null) for column in ("user_id", "item_id"))
    value = value_sql(time[0], layout.null) if time else "position"
    connection.execute(
        "CREATE OR REPLACE TABLE raw AS SELECT row_number() OVER (ORDER BY line_number, position) "
        f"AS row_number, {user} AS user_id, {item} AS item_id, {value} AS time, line_number "
        f"FROM (SELECT line_number, user_id, unnest(items) AS item_id{times}, "
        "unnest(range(1, len(items) + 1)) AS position FROM lists)"
    )
    connection.execute("DROP TABLE lists")
    kind = time[1] if time else "order"
    return _raw(connection, file, names, what, "row_number, user_id, item_id, time", kind)


def _raw(
    connection: duckdb.DuckDBPyConnection,
    file: InputFile,
    names: list[str],
    what: str,
    columns: str,
    time_kind: str = "order",
) -> Scan:
    def where(row: int) -> str:
        sql = "SELECT line_number FROM raw WHERE row_number = $1"
        return f"{file.name}, {what} {one(connection, sql, [row])[0]}"

    def close() -> None:
        connection.execute("DROP TABLE IF EXISTS raw")

    return Scan(f"SELECT {columns} FROM raw", names, where, close=close, time_kind=time_kind)
