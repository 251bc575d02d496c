"""Where preparation works: a folder beside the output that survives a crash, and the record of what is done in it.

``.<output>.partial/`` holds ``plan.json`` (the source and configuration it belongs to), the database with every finished step,
``out/`` with the finished files, and ``shards.jsonl``, a line for each finished shard. When the work is done, ``out/`` becomes
the output and the rest goes.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import psutil

from mltfr_dist.config import PrepareResources
from mltfr_dist.data.manifest import ShardInfo
from mltfr_dist.data.readers import quote_text
from mltfr_dist.errors import DataError
from mltfr_dist.files import file_sha256, write_atomically

Log = Callable[[str], None]
_SECONDS_BETWEEN_LINES = 10.0
_DEFAULT_SHARE = 0.6


class WrittenShard(NamedTuple):
    """A finished shard."""

    info: ShardInfo
    last_user: int


class Workspace:
    """The folder of one preparation."""

    def __init__(self, output: Path, resources: PrepareResources, log: Log) -> None:
        self.folder = output.parent / f".{output.name}.partial"
        self.out, self._plan, self._journal = (
            self.folder / name for name in ("out", "plan.json", "shards.jsonl")
        )
        self.resources, self.log = resources, log
        self.temporary = (
            resources.temp_dir / f"{output.name}.partial" if resources.temp_dir else self.folder
        )
        self.fetched = self.temporary / "fetched"
        """Where copies of remote sources go."""

    def claim(self, plan: dict[str, Any]) -> None:
        """Begin, or go on with what was interrupted.

        Raises:
            DataError: what is there was begun from another source or configuration.
        """
        if self._plan.is_file():
            before = json.loads(self._plan.read_text())
            changed = [
                f"{key} was {before.get(key)}, now {plan[key]}"
                for key in plan
                if before.get(key) != plan[key]
            ]
            if changed:
                raise DataError(
                    f"{self.folder} is half prepared, and differently: {'; '.join(changed)}.",
                    rule="An interrupted preparation goes on only with the same source, configuration and temp_dir.",
                    remedy=f"Prepare as before, give another output folder, or remove {self.folder}.",
                )
            self.log(f"Going on with the preparation that was interrupted in {self.folder}.")
            return
        self.out.mkdir(parents=True, exist_ok=True)
        self.temporary.mkdir(parents=True, exist_ok=True)
        write_atomically(self._plan, json.dumps(plan))

    def remove(self) -> None:
        """Delete everything."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.temporary, ignore_errors=True)

    @contextmanager
    def database(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """The database, within the limits that the user set.

        Raises:
            DataError: another process is preparing the same output, or memory or disk do not suffice.
        """
        settings = {
            "temp_directory": str(self.temporary / "spill"),
            "autoinstall_known_extensions": "false",
            "memory_limit": self.resources.memory_limit
            or f"{int(psutil.virtual_memory().total * _DEFAULT_SHARE)}B",
        }
        if self.resources.threads:
            settings["threads"] = str(self.resources.threads)
        try:
            with duckdb.connect(
                str(self.temporary / "prepare.duckdb"), config=settings
            ) as connection:
                connection.execute(
                    "SET TimeZone = 'UTC'; SET preserve_insertion_order = true; SET enable_progress_bar = true"
                )
                connection.execute("SET enable_progress_bar_print = false")
                connection.execute("CREATE TABLE IF NOT EXISTS done(step VARCHAR, value VARCHAR)")
                with self._progress(connection):
                    yield connection
        except duckdb.OutOfMemoryException as error:
            raise DataError(
                f"Preparation does not fit into memory_limit={settings['memory_limit']}: {str(error).splitlines()[0]}",
                rule="What does not fit goes to disk, but each thread needs some memory of its own.",
                remedy="Raise memory_limit, lower threads, or free disk under temp_dir. It goes on where it stopped.",
            ) from None
        except duckdb.IOException as error:
            raise DataError(
                f"The database of the preparation cannot be used: {str(error).splitlines()[0]}",
                rule="One process prepares an output, with enough disk under temp_dir.",
                remedy="Wait for the other process, or free disk. It goes on where it stopped.",
            ) from None

    def step(
        self, connection: duckdb.DuckDBPyConnection, name: str, work: Callable[[], Any]
    ) -> Any:
        """Do ``work`` once, all or nothing; its value (as JSON) is kept for when the preparation is started again."""
        found = connection.execute("SELECT value FROM done WHERE step = $1", [name]).fetchall()
        if found:
            self.log(f"{name}: done before the interruption")
            return json.loads(found[0][0])
        connection.begin()
        try:
            value = json.dumps(work())
            connection.execute(f"INSERT INTO done VALUES ({quote_text(name)}, {quote_text(value)})")
        except BaseException:
            connection.rollback()
            raise
        connection.commit()
        return json.loads(value)

    # --- shards ------------------------------------------------------------------------------------------------

    def record_shard(self, split: str, info: ShardInfo, last_user: int) -> None:
        """Note a finished shard."""
        with self._journal.open("a", encoding="utf-8") as file:
            # The line end comes first, so that a line that a crash cut does not spoil this one.
            file.write(
                "\n"
                + json.dumps({"split": split, "last_user": last_user, "info": info.model_dump()})
            )

    def written_shards(self, split: str) -> list[WrittenShard]:
        """The finished shards of a split that are still what was written, up to the first that is not."""
        found: list[WrittenShard] = []
        for line in (
            self._journal.read_text(encoding="utf-8").splitlines() if self._journal.exists() else []
        ):
            try:
                values = json.loads(line)
            except ValueError:  # empty, or cut by the interruption
                continue
            if values["split"] != split:
                continue
            shard = WrittenShard(ShardInfo.model_validate(values["info"]), values["last_user"])
            path = self.out / shard.info.file
            is_next = shard.info.file == f"{split}-{len(found):06d}.tar"
            if is_next and path.is_file() and file_sha256(path) == shard.info.sha256:
                found.append(shard)
        return found

    # --- progress ----------------------------------------------------------------------------------------------

    @contextmanager
    def _progress(self, connection: duckdb.DuckDBPyConnection) -> Iterator[None]:
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
                    self.log(f"  ... {share:.0f}% of this query, about {left:.0f} s left")

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()
