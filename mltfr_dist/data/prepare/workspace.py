"""Where preparation works: a folder that survives a crash, and the record of what is done in it.

``.<output>.partial/`` holds ``plan.json`` (the source and configuration it belongs to), ``out/``
with the finished files, and ``shards.jsonl``, a line for each finished shard. ``plan-<digest>/``
holds the database with every finished step. It lies there, or under ``--temp-dir`` in a folder of
this output alone; the digest is of the plan and the places, and the database holds it, too, so that
no step of another preparation is ever believed. All of it lies beside the output, or in it where
the output is a folder already (a mount point, the target of a link). When the work is done,
``out/`` becomes the output and the rest goes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import duckdb

from mltfr_dist.config import PrepareConfig, PrepareResources
from mltfr_dist.data.prepare.database import open_database, refuse_if_used
from mltfr_dist.data.prepare.disk import check_space, check_writable, disk_errors
from mltfr_dist.data.shards.manifest import MANIFEST_NAME, ShardInfo
from mltfr_dist.data.sources.readers import quote_text
from mltfr_dist.errors import DataError
from mltfr_dist.files import file_sha256, write_atomically

Log = Callable[[str], None]


class WrittenShard(NamedTuple):
    """A finished shard."""

    info: ShardInfo
    last_user: int


class Workspace:
    """The folder of one preparation."""

    def __init__(
        self, output: Path, resources: PrepareResources, log: Log, *, source: Sequence[str]
    ) -> None:
        """Nothing is written yet.

        Args:
            output: the folder to prepare.
            resources: ``temp_dir`` is where the database and copies go.
            log: takes lines.
            source: the places that the user named; copies made of another source are not used.
        """
        self.output, self.resources, self.log = output, resources, log
        target = output.resolve()
        name = f".{target.name}.partial"
        self._beside, self._inside = target.parent / name, target / name
        is_inside = output.is_dir() and not (output / MANIFEST_NAME).exists()
        self.folder = self._inside if is_inside else self._beside
        self.out, self._plan, self._journal = (
            self.folder / name for name in ("out", "plan.json", "shards.jsonl")
        )
        self.temporary = self.folder
        if resources.temp_dir:
            # Outputs of one name may share a temp_dir, so the name alone does not do.
            key = f"{target.name[:40]}-{_digest(str(target))}.partial"
            self.temporary = resources.temp_dir.resolve() / key
        self.fetched = self.temporary / f"fetched-{_digest(json.dumps(list(source)))}"
        """Where copies of remote sources and frames go."""
        self._work = self.temporary
        self._digest = ""
        parents = {*self.folder.parents, *self.temporary.parents}
        self._made = sorted((p for p in parents if not p.exists()), reverse=True)

    @property
    def copies(self) -> Path:
        """Where unpacked copies of this plan's files go."""
        return self._work / "plain"

    def check_places(self) -> None:
        """Whether output and temporary files can be written.

        Raises:
            DataError: they cannot, or the output was made while it was half prepared beside.
        """
        if self.folder == self._inside and (self._beside / "plan.json").exists():
            raise DataError(
                f"{self._beside} is half prepared, and the folder {self.output} was made since.",
                rule="An output that exists is prepared in the folder itself, any other beside it.",
                remedy=f"Remove the empty folder {self.output} to go on, "
                f"or remove {self._beside} to begin anew.",
            )
        check_writable(self.folder, f"the output {self.output}")
        if self.resources.temp_dir:
            check_writable(self.temporary, f"--temp-dir {self.resources.temp_dir}")

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Full disks and unreadable files as one paragraph (see :func:`disk_errors`)."""
        with disk_errors(list(dict.fromkeys((self.folder, self.temporary)))):
            yield

    def claim(self, plan: dict[str, Any], source_bytes: int = 0) -> None:
        """Begin, or go on with what was interrupted.

        Args:
            plan: the source and configuration; only an equal one goes on.
            source_bytes: size of the source, from which a rough need of disk follows.

        Raises:
            DataError: what is there was begun from another source or configuration, or the disk
                is too small.
        """
        temp_dir = self.resources.temp_dir
        plan = plan | {
            "temp_dir": str(temp_dir.resolve()) if temp_dir else None,
            "output": str(self.output.resolve()) if temp_dir else None,
        }
        self._digest = _digest(json.dumps(plan, sort_keys=True))
        self._work = self.temporary / f"plan-{self._digest}"
        before = self._plan_before()
        if before is None:
            self._remove_leftovers()
            check_space(self.temporary, source_bytes, self.log)
            self.out.mkdir(parents=True, exist_ok=True)
            self._work.mkdir(parents=True, exist_ok=True)
            write_atomically(self._plan, json.dumps(plan))
            return
        changed = differences(before, plan)
        if changed:
            raise DataError(
                f"{self.folder} is half prepared, and differently: {changed}.",
                rule="An interrupted preparation goes on only with the same source, options "
                "and --temp-dir.",
                remedy=f"Prepare as before, give another output folder, or remove {self.folder}.",
            )
        self.log(f"Going on with the preparation that was interrupted in {self.folder}.")
        self.out.mkdir(exist_ok=True)
        self._work.mkdir(parents=True, exist_ok=True)

    def _plan_before(self) -> dict[str, Any] | None:
        """The plan that was begun here; None where there is none, or a power cut spoilt it."""
        try:
            values = json.loads(self._plan.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return values if isinstance(values, dict) else None

    def _remove_leftovers(self) -> None:
        """Delete what belongs to no plan, as after ``.<output>.partial`` was removed by hand.

        Raises:
            DataError: another process is working there.
        """
        names = ("out", "shards.jsonl", "plan-*", "prepare.duckdb*", "spill", "fetched-*")
        for folder in dict.fromkeys((self.folder, self.temporary)):
            for path in (leftover for name in names for leftover in folder.glob(name)):
                if path == self.fetched:
                    continue
                refuse_if_used(path)
                self.log(f"Removing {path}, left by a preparation that was given up.")
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def publish(self) -> None:
        """Make ``out`` the output: in one step, or file by file with the manifest last."""
        if self.folder == self._beside:
            self.out.rename(self.output)  # there is none, as it was not there at the start
            return
        files = sorted(self.out.iterdir(), key=lambda path: path.name == MANIFEST_NAME)
        for path in files:
            path.replace(self.output / path.name)

    def drop_fetched(self) -> None:
        """Delete copies of remote sources and frames, and nothing else."""
        shutil.rmtree(self.fetched, ignore_errors=True)
        with suppress(OSError):  # it holds more
            self.temporary.rmdir()

    def remove(self) -> None:
        """Delete everything."""
        for folder in (self._beside, self._inside, self.temporary):
            shutil.rmtree(folder, ignore_errors=True)

    def abandon(self) -> None:
        """Delete everything, also folders above that were made for it."""
        self.remove()
        for folder in self._made:
            with suppress(OSError):  # somebody put something there meanwhile
                folder.rmdir()

    @contextmanager
    def database(self) -> Iterator[duckdb.DuckDBPyConnection]:
        """The database of this plan, within the limits that the user set.

        Raises:
            DataError: another process is preparing the same output, or memory or disk do not
                suffice.
        """
        with open_database(self._work, self._digest, self.resources, self.log) as connection:
            yield connection

    def step(
        self, connection: duckdb.DuckDBPyConnection, name: str, work: Callable[[], Any]
    ) -> Any:
        """Do ``work`` once, all or nothing; its value (as JSON) is kept for when the preparation is
        started again.
        """
        rows = connection.execute("SELECT value FROM done WHERE step = $1", [name]).fetchall()
        if rows:
            self.log(f"{name}: done before the interruption")
            return json.loads(rows[0][0])
        connection.begin()
        try:
            value = json.dumps(work())
            connection.execute(f"INSERT INTO done VALUES ({quote_text(name)}, {quote_text(value)})")
        except BaseException:
            connection.rollback()
            raise
        connection.commit()
        return json.loads(value)

    # --- shards
    # --------------------------------------------------------------------------------------------

    def record_shard(self, split: str, info: ShardInfo, last_user: int) -> None:
        """Note a finished shard."""
        values = {"plan": self._digest, "split": split, "last_user": last_user}
        with self._journal.open("a", encoding="utf-8") as file:
            # The line end comes first, so that a line that a crash cut does not spoil this one.
            file.write("\n" + json.dumps(values | {"info": info.model_dump()}))

    def written_shards(self, split: str) -> list[WrittenShard]:
        """The finished shards of a split that are still what was written, up to the first that is
        not.
        """
        written: list[WrittenShard] = []
        for line in (
            self._journal.read_text(encoding="utf-8").splitlines() if self._journal.exists() else []
        ):
            try:
                values = json.loads(line)
            except ValueError:  # empty, or cut by the interruption
                continue
            if (values["plan"], values["split"]) != (self._digest, split):
                continue
            shard = WrittenShard(ShardInfo.model_validate(values["info"]), values["last_user"])
            path = self.out / shard.info.file
            is_next = shard.info.file == f"{split}-{len(written):06d}.tar"
            if is_next and path.is_file() and file_sha256(path) == shard.info.sha256:
                written.append(shard)
        return written


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two plans, options as on the command line; empty where nothing does."""
    options = {*PrepareConfig.model_fields, *PrepareResources.model_fields}
    return "; ".join(
        f"{'--' + key.replace('_', '-') if key in options else key} was {before.get(key)}, now "
        f"{now[key]}"
        for key in now
        if before.get(key) != now[key]
    )


def _digest(text: str) -> str:
    """A short name for a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
