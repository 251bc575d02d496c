"""A JSON object a line."""

from __future__ import annotations

import duckdb

from mltfr_dist.data.sources.delimited import column_index
from mltfr_dist.data.sources.formats import Format
from mltfr_dist.data.sources.inputs import InputFile
from mltfr_dist.data.sources.readers import (
    SINGLE,
    Scan,
    constants,
    no_rows,
    one,
    quote_text,
    read_lines,
    reading,
    value_sql,
)
from mltfr_dist.errors import DataError


def open_json(
    connection: duckdb.DuckDBPyConnection,
    file: InputFile,
    layout: Format,
    columns: list[str],
    aliases: list[str],
) -> Scan:
    """Check every line and make ready to read ``columns`` as ``aliases``.

    Raises:
        DataError: a line that is no object, a key that is missing or there twice, a value that is a
            list, an object or a boolean, or ids that are numbers and texts.
    """
    read_lines(connection, file)
    if not one(connection, "SELECT count(*) FROM lines")[0]:
        raise no_rows(file)
    own = {name: alias for name, alias in zip(columns, aliases) if name not in file.partitions}
    pointers = {name: quote_text("/" + name.replace("~", "~0").replace("/", "~1")) for name in own}
    with reading(file, "jsonl"):
        keys = _check_lines(connection, file, list(own), titles="title" in aliases)
        _check_keys(connection, file, list(own))
        kinds = _check_types(connection, file, pointers, own)
    values = constants(file, keys) | {name: f"(line ->> {pointers[name]})" for name in own}
    fields = [
        f"{value_sql(values[name], layout.null)} AS {alias}"
        for name, alias in zip(columns, aliases)
    ]

    def close() -> None:
        connection.execute("DROP TABLE lines")

    return Scan(
        f"SELECT row_number, {', '.join(fields)} FROM lines",
        columns,
        lambda row: f"{file.name}, line {row}",
        close=close,
        kinds=kinds,
    )


def _check_lines(
    connection: duckdb.DuckDBPyConnection, file: InputFile, columns: list[str], *, titles: bool
) -> list[str]:
    """Refuse lines that are no object, and columns that the first does not have; its keys."""
    bad = connection.execute(
        "SELECT row_number, line FROM lines WHERE CASE WHEN json_valid(line) "
        "THEN json_type(line) <> 'OBJECT' ELSE true END ORDER BY row_number LIMIT 1"
    ).fetchall()
    for row_number, line in bad:
        raise DataError(
            f"{file.name}, line {row_number}: `{line[:80]}` is no JSON object.",
            rule="Each line of a jsonl file is one JSON object.",
            remedy="Correct or remove that line.",
        )
    first = one(connection, "SELECT json_keys(line) FROM lines ORDER BY row_number LIMIT 1")
    keys: list[str] = first[0]
    for name in columns:
        if name not in keys:
            column_index(file, name, list(dict.fromkeys(keys)), titles=titles)
            raise DataError(  # `name:type` is no way to name a key
                f"{file.name} has no key `{name}`.", remedy="Give the key as it is written there."
            )
    return keys


def _check_keys(connection: duckdb.DuckDBPyConnection, file: InputFile, columns: list[str]) -> None:
    """Refuse objects that have a wanted key twice."""
    for name in columns:
        # The quoted key twice in the text is rare, and not yet twice in the object.
        key = quote_text(f'"{name}"')
        rows = connection.execute(
            f"SELECT row_number FROM lines WHERE length(line) - length(replace(line, {key}, '')) > "
            f"length({key}) AND len(list_filter(json_keys(line), lambda k: k = $1)) > 1 "
            "ORDER BY row_number LIMIT 1",
            [name],
        ).fetchall()
        for (row,) in rows:
            raise DataError(
                f"{file.name}, line {row}: the object has the key `{name}` twice.",
                rule="Which of the values is meant cannot be known.",
                remedy="Correct or remove that line.",
            )


def _check_types(
    connection: duckdb.DuckDBPyConnection,
    file: InputFile,
    pointers: dict[str, str],
    aliases: dict[str, str],
) -> dict[str, tuple[str, str]]:
    """Refuse values that are not single, and ids that are numbers and texts; kinds of ids."""
    groups = connection.execute(
        f"SELECT json_type(line, [{', '.join(pointers.values())}]) AS kinds, min(row_number) "
        "FROM lines GROUP BY kinds ORDER BY 2"
    ).fetchall()
    if not pointers:
        return {}
    seen: dict[str, tuple[str, str]] = {}
    for kinds, line in groups:
        for column, alias, kind in zip(aliases, aliases.values(), kinds):
            if kind in ("ARRAY", "OBJECT", "BOOLEAN"):
                raise DataError(
                    f"{file.name}, line {line}: `{column}` is of type {kind.lower()}.",
                    rule=SINGLE,
                    remedy="Correct or remove that line.",
                )
            if kind in (None, "NULL") or not alias.endswith("_id"):
                continue
            what = "a text" if kind == "VARCHAR" else "a number"
            other, before = seen.setdefault(alias, (what, f"{file.name}, line {line}"))
            if other != what:
                raise DataError(
                    f"{file.name}, line {line}: `{column}` is of mixed types: it is {what}, and "
                    f"{other} in {before}.",
                    rule='An id is compared as text, so 7 and "7" would be the same one.',
                    remedy="Write the whole column in one way.",
                )
    return seen
