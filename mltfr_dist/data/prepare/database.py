"""The database of a preparation: for one plan alone, within limits, and with lines on long
queries.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import psutil

from mltfr_dist.config import PrepareResources
from mltfr_dist.data.prepare.disk import is_full
from mltfr_dist.data.sources.readers import quote_text
from mltfr_dist.errors import DataError
from mltfr_dist.progress import duration

_NAME = "prepare.duckdb"
_SECONDS_BETWEEN_LINES = 10.0
_DEFAULT_SHARE = 0.6


@contextmanager
def open_database(
    folder: Path, digest: str, resources: PrepareResources, log: Callable[[str], None]
) -> Iterator[duckdb.DuckDBPyConnection]:
    """The database in ``folder``, made where there is none.

    Args:
        folder: holds it and what queries spill.
        digest: of the plan that its steps belong to.
        resources: memory and threads.
        log: takes lines.

    Raises:
        DataError: another process has it open, it is another plan's, or memory does not suffice.
    """
    limit = resources.memory_limit or f"{int(psutil.virtual_memory().total * _DEFAULT_SHARE)}B"
    settings = {"autoinstall_known_extensions": "false", "memory_limit": limit}
    if resources.threads:
        settings["threads"] = str(resources.threads)
    try:
        with _connect(folder, settings, log) as connection:
            _set_up(connection, folder, digest)
            with _progress(connection, log):
                yield connection
    except duckdb.OutOfMemoryException as error:
        if is_full(error):
            raise
        raise DataError(
            f"Preparation does not fit into --memory-limit {limit}: {str(error).splitlines()[0]}",
            rule="What does not fit goes to disk, but each thread needs some memory of its own.",
            remedy="Raise --memory-limit or lower --threads. It goes on where it stopped.",
        ) from None
    except duckdb.IOException as error:
        if is_full(error):
            raise
        raise DataError(
            f"The database of the preparation cannot be used: {str(error).splitlines()[0]}",
            rule="One process prepares an output, on a disk that works.",
            remedy="Wait for the other process, or look after the disk. "
            "It goes on where it stopped.",
        ) from None


def refuse_if_used(folder: Path) -> None:
    """Refuse to touch a folder whose database another process has open.

    Raises:
        DataError: it has.
    """
    if not (folder / _NAME).exists():
        return
    try:
        duckdb.connect(str(folder / _NAME)).close()
    except duckdb.Error as error:
        if _is_used(error):
            raise DataError(
                f"Another process is working in {folder}: {str(error).splitlines()[0]}",
                rule="One process prepares an output.",
                remedy="Wait for it, or stop it, and start the same command again.",
            ) from None


def _connect(
    folder: Path, settings: dict[str, str], log: Callable[[str], None]
) -> duckdb.DuckDBPyConnection:
    path = folder / _NAME
    try:
        return duckdb.connect(str(path), config=settings)
    except duckdb.Error as error:
        if _is_used(error) or is_full(error) or isinstance(error, duckdb.OutOfMemoryException):
            raise
        log(f"{path} did not survive the interruption: all steps are done again.")
        shutil.rmtree(folder)
        folder.mkdir()
        return duckdb.connect(str(path), config=settings)


def _set_up(connection: duckdb.DuckDBPyConnection, folder: Path, digest: str) -> None:
    """Settings, the record's tables, and the comparison with the plan before a step is believed."""
    spill = folder / "spill"
    shutil.rmtree(spill, ignore_errors=True)  # of a process that was killed: this one has the lock
    connection.execute(
        f"SET temp_directory = {quote_text(str(spill))}; SET TimeZone = 'UTC'; "
        "SET preserve_insertion_order = true; "
        "SET disabled_compression_methods = 'dict_fsst'; "  # a third of a text's reading
        "SET enable_progress_bar = true; SET enable_progress_bar_print = false"
    )
    connection.execute(
        "BEGIN; CREATE TABLE IF NOT EXISTS done(step VARCHAR, value VARCHAR); "
        "CREATE TABLE IF NOT EXISTS plan(digest VARCHAR); "
        f"INSERT INTO plan SELECT {quote_text(digest)} WHERE NOT EXISTS (FROM plan); COMMIT"
    )
    if connection.execute("SELECT digest FROM plan").fetchall() != [(digest,)]:
        raise DataError(
            f"{folder / _NAME} belongs to another preparation.",
            rule="No step is taken over from another source, configuration or output.",
            remedy=f"Remove {folder} and start the same command again.",
        )


def _is_used(error: duckdb.Error) -> bool:
    """Whether a database could not be opened because another process has it open."""
    return "set lock on file" in str(error)


@contextmanager
def _progress(connection: duckdb.DuckDBPyConnection, log: Callable[[str], None]) -> Iterator[None]:
    """Lines while a long query runs: how far it is, and about how long it will go on."""
    ended = threading.Event()

    def watch() -> None:
        began, before = time.monotonic(), 100.0
        while not ended.wait(_SECONDS_BETWEEN_LINES):
            share = connection.query_progress()
            if share < before:  # another query
                began = time.monotonic() - _SECONDS_BETWEEN_LINES
            before = share
            if 0 < share < 100:
                left = (time.monotonic() - began) * (100 - share) / share
                try:
                    log(f"  ... {share:.0f}% of this query, about {duration(left)} left")
                except BrokenPipeError:  # the main thread meets it with its next line
                    return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
