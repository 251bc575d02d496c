"""The files of a source into ``interactions``, and what must hold for all of them together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import duckdb

from mltfr_dist.config import PrepareConfig
from mltfr_dist.data.sources.checks import check_ids, missing
from mltfr_dist.data.sources.delimited import open_delimited
from mltfr_dist.data.sources.formats import NAMED, Format
from mltfr_dist.data.sources.inputs import InputFile
from mltfr_dist.data.sources.json_lines import open_json
from mltfr_dist.data.sources.layouts import layout, refuse_other_format
from mltfr_dist.data.sources.lines import open_lines
from mltfr_dist.data.sources.lists import (
    open_list_columns,
    open_pairs,
    open_sequences,
    open_token_seq,
)
from mltfr_dist.data.sources.parquet import column_types, not_integers, open_parquet
from mltfr_dist.data.sources.readers import EMPTY, Scan, no_rows, one, reading
from mltfr_dist.data.sources.times import bad_time, check_pattern, check_times, text_kind, time_sql
from mltfr_dist.errors import ConfigError, DataError

_ALIASES = ["user_id", "item_id", "time"]
_WHOLE_HISTORIES = ("sequences", "parquet-lists", "recbole-sequences")


class Source:
    """Files of one kind, read one after the other.

    Attributes:
        rows: rows that were kept.
    """

    def __init__(
        self,
        connection: duckdb.DuckDBPyConnection,
        config: PrepareConfig,
        log: Callable[[str], None],
    ) -> None:
        self.rows = 0
        self._connection, self._config, self._log = connection, config, log
        self._read = 0
        self._time_kind, self._names = "", list[str]()
        self._starts: list[tuple[int, InputFile, str]] = []
        self._kinds: dict[str, tuple[str, str]] = {}
        self._as_text: frozenset[str] = frozenset()
        if config.time_format is not None:
            check_pattern(connection, config.time_format)

    def look_ahead(self, files: Sequence[InputFile], formats: Sequence[str]) -> None:
        """Which columns are whole numbers in all files, where the files say it themselves.

        Raises:
            DataError: a Parquet file cannot be read, or has not these columns.
        """
        for file, format in zip(files, formats):
            if format == "parquet" and len(files) > 1:
                chosen = layout(format, self._config)
                types = column_types(self._connection, file, chosen.columns)
                self._as_text |= not_integers(types, _ALIASES)

    def add(self, file: InputFile, format: str) -> None:
        """Read a file, behind the rows that are there.

        Raises:
            DataError: the file, or one of its rows, cannot be used.
        """
        chosen = layout(format, self._config)
        if format in NAMED:
            refuse_other_format(file, format)
        if format == "mind" and self._starts:
            raise DataError(
                f"{file.name} is a second file of {format}.",
                rule="The histories of several files hold the same clicks.",
                remedy="Join the files to one: a user's history is that of the first impression.",
            )
        scan = self._open(file, format, chosen)
        self._check_kinds(scan)
        self._names = scan.names
        total = None
        if chosen.time is None and scan.time_kind != "order":
            scan = dataclasses.replace(
                scan, sql=f"SELECT *, row_number AS time FROM ({scan.sql})", time_kind="order"
            )
        if chosen.missing == "drop":
            scan, total = self._without_missing(file, format, scan)
        kind = self._kind(scan, chosen)
        parsed = time_sql(kind, chosen.time_format, is_text=scan.time_kind == "text")
        if kind == "order" and self._read:
            self._refuse_known_users(scan, file, format, chosen)
            parsed = f"time + {self._read}"
        into = (
            "INSERT INTO interactions" if self.rows else "CREATE OR REPLACE TABLE interactions AS"
        )
        with reading(file, format):
            (count,) = one(
                self._connection,
                f"{into} SELECT row_number + {self._read} AS row_number, user_id, item_id, "
                f"{parsed} AS timestamp FROM ({scan.sql})",
            )
        scan.finish()
        if not count:
            scan.close()
            raise no_rows(file)
        if not self._starts:
            self._say(format, chosen, kind)
        self._time_kind = kind
        self._starts.append((self._read, file, format))
        self._refuse_missing(scan, kind, chosen)
        self.rows += count
        self._read += count if total is None else total
        scan.close()

    def check(self) -> None:
        """Refuse what only all rows together show.

        Raises:
            DataError: ids or times that are wrong, with the first such row.
        """
        described = self._connection.execute("DESCRIBE interactions").fetchall()
        types = {row[0]: row[1] for row in described}
        for column, name in zip(_ALIASES[:2], self._names):
            if types[column] == "VARCHAR":
                strict = self._config.ids == "checked"
                check_ids(self._connection, column, name, self.locate, strict=strict)
        if self._config.times == "checked" and self._time_kind != "order":
            check_times(self._connection, self._time_kind, self._names[2], self.locate)

    def locate(self, row: int) -> str:
        """`file, line N` of a row of the source; it opens the file again."""
        before, file, format = max(
            (start for start in self._starts if start[0] < row), key=lambda start: start[0]
        )
        return self._open(file, format, layout(format, self._config)).where(row - before)

    def _open(self, file: InputFile, format: str, chosen: Format) -> Scan:
        """Make a file ready to be read, by the reader of its format."""
        connection, columns = self._connection, chosen.columns
        aliases = _ALIASES[: len(columns)]
        if format == "sequences":
            as_items = self._config.times == "any"
            return open_sequences(connection, file, chosen, times_are_items=as_items)
        if format == "pairs":
            return open_pairs(connection, file, chosen)
        if format == "parquet-lists":
            return open_list_columns(connection, file, chosen)
        if format == "recbole-sequences":
            return open_token_seq(connection, file, chosen)
        if chosen.reader == "lines":
            return open_lines(connection, file, format, chosen)
        if chosen.reader == "jsonl":
            return open_json(connection, file, chosen, columns, aliases)
        if chosen.reader == "delimited":
            return open_delimited(connection, file, chosen, columns, aliases)
        return open_parquet(connection, file, chosen, columns, aliases, self._as_text)

    def _check_kinds(self, scan: Scan) -> None:
        """Refuse a column that is of another kind than in the files before."""
        for alias, name in zip(_ALIASES, scan.names):
            if alias not in scan.kinds:
                continue
            kind, where = scan.kinds[alias]
            other, before = self._kinds.setdefault(alias, (kind, where))
            if other != kind:
                raise DataError(
                    f"{where}: its ids or times are of another kind than those of the files before "
                    f"it: `{name}` is {kind}, and {other} in {before}.",
                    rule="All files of a source have the same columns, of the same types.",
                    remedy="Convert the files to one type, or prepare them apart.",
                )

    def _kind(self, scan: Scan, chosen: Format) -> str:
        """The kind of the times; of text, it is that of the first, in the first file."""
        kind = scan.time_kind
        if chosen.time_format is not None and kind != "order":
            if kind == "moments":
                raise ConfigError(
                    f"--time-format is given, but `{scan.names[2]}` holds moments, not text.",
                    remedy="Leave --time-format out.",
                )
            return "pattern"
        if kind != "text":
            return kind
        if self._time_kind:
            return self._time_kind
        first = self._connection.execute(
            f"SELECT time FROM ({scan.sql}) WHERE NOT {EMPTY.format('time')} LIMIT 1"
        ).fetchall()
        scan.finish()
        return text_kind(first[0][0]) if first else "numbers"

    def _without_missing(self, file: InputFile, format: str, scan: Scan) -> tuple[Scan, int]:
        """The scan without rows that lack a value, and the number of all its rows."""
        with reading(file, format):
            self._connection.execute(f"CREATE OR REPLACE TABLE every AS {scan.sql}")
        scan.finish()
        scan.close()
        full = " AND ".join(f"NOT {EMPTY.format(alias)}" for alias in _ALIASES)
        total, last, kept = one(
            self._connection,
            f"SELECT count(*), coalesce(max(row_number), 0), count(*) FILTER ({full}) FROM every",
        )
        if total > kept:
            self._log(
                f"{file.name}: {total - kept:,} of {total:,} rows have no user, no item or no time "
                "and are left out."
            )

        def close() -> None:
            self._connection.execute("DROP TABLE every")

        sql = f"SELECT * FROM every WHERE {full}"
        return dataclasses.replace(scan, sql=sql, finish=lambda: None, close=close), int(last)

    def _refuse_missing(self, scan: Scan, kind: str, chosen: Format) -> None:
        """Refuse rows of the file just read without a user, an item or a time."""
        firsts = ", ".join(
            f"min(row_number) FILTER ({column} IS NULL)"
            for column in ("user_id", "item_id", "timestamp")
        )
        rows = one(
            self._connection,
            f"SELECT {firsts}, min(row_number) FROM interactions WHERE row_number > {self._read}",
        )
        for name, row in zip(scan.names, rows[:3]):
            if row is None:
                continue
            where = self.locate(row)
            if name != scan.names[-1] or row != rows[2]:
                raise missing(name, where)
            (value,) = one(
                self._connection,
                f"SELECT CAST(time AS VARCHAR) FROM ({scan.sql}) "
                f"WHERE row_number = {row - self._read}",
            )
            if value is None or not value.strip():
                raise missing(name, where)
            raise bad_time(
                self._connection,
                where,
                name,
                value,
                kind,
                chosen.time_format,
                is_first=len(self._starts) == 1 and row == rows[3],
            )

    def _refuse_known_users(self, scan: Scan, file: InputFile, format: str, chosen: Format) -> None:
        """Refuse a whole history of a user who has one in a file before."""
        if format not in _WHOLE_HISTORIES:
            return
        rows = self._connection.execute(
            f"SELECT user_id, row_number FROM ({scan.sql}) WHERE user_id IN "
            "(SELECT user_id FROM interactions) ORDER BY row_number LIMIT 1"
        ).fetchall()
        for user, row in rows:
            raise DataError(
                f"{self._open(file, format, chosen).where(row)}: the user `{user}` was in a file "
                "before.",
                rule="Lists that carry no time are whole histories, one for each user.",
                remedy="Join the user's lists, oldest first.",
            )

    def _say(self, format: str, chosen: Format, kind: str) -> None:
        """What is decided for the user, as lines of the log."""
        notes = list(chosen.notes)
        if chosen.skip_rows:
            notes.append(f"The first {chosen.skip_rows} lines of each file are not read.")
        if kind == "order" and format != "sequences":
            notes.append("No time is read: rows and lists count as oldest first, as they stand.")
        if kind in ("dates", "pattern"):
            notes.append("Times without a zone count as UTC.")
        for note in notes:
            self._log(f"{format}: {note}")
