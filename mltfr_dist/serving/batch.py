"""Recommendations for a file of histories, however long: part by part, and on after a kill.

Parts lie in a folder beside the output until all are there; each is written in one step, so none is
half there, and rows and parts are counted alike in every call. Then they become the output, in one
step too.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mltfr_dist import __version__
from mltfr_dist.errors import ConfigError, DataError, MltfrError
from mltfr_dist.files import replacing, write_atomically, writing
from mltfr_dist.progress import SECONDS_IN_LOG, StatusLine, duration, say
from mltfr_dist.ranking import Ranker
from mltfr_dist.serving.candidates import Empty
from mltfr_dist.serving.files import Row, count_rows, read_rows, user_type
from mltfr_dist.serving.histories import Histories, Unknown
from mltfr_dist.serving.items import as_texts

PART_ROWS = 1024
PLAN, DROPPED = "plan.json", b"dropped"
WAIT_SECONDS = 0.2


@dataclass(frozen=True)
class BatchOptions:
    """What is recommended to every user."""

    k: int = 10
    filter_seen: bool = True
    unknown: Unknown = "refuse"
    empty: Empty = "refuse"


@dataclass(frozen=True)
class Work:
    """One file of histories to one of recommendations."""

    model: Ranker
    histories: Path
    output: Path
    options: BatchOptions
    num_rows: int

    @property
    def folder(self) -> Path:
        """Of the parts."""
        return self.output.with_name(f".parts-{self.output.name}")

    @property
    def num_parts(self) -> int:
        """Parts of :data:`PART_ROWS` users."""
        return -(-self.num_rows // PART_ROWS)

    def part(self, number: int) -> Path:
        """File of a part."""
        return self.folder / f"part-{number:06}.parquet"

    @property
    def missing(self) -> list[int]:
        """Parts that are not there yet."""
        return [n for n in range(self.num_parts) if not self.part(n).exists()]

    def plan(self) -> str:
        """What parts must have been made from, to belong together."""
        stat = self.histories.stat()
        what = {
            "mltfr_dist": __version__,
            "histories": [self.histories.name, stat.st_size, stat.st_mtime_ns, self.num_rows],
            "part_rows": PART_ROWS,
            "model": model_hash(self.model),
            "options": asdict(self.options),
        }
        return json.dumps(what, indent=2) + "\n"


def recommend_file(
    model: Ranker,
    histories: Path,
    output: Path,
    options: BatchOptions,
    *,
    rank: int = 0,
    world_size: int = 1,
    log: Callable[[str], None] = say,
) -> None:
    """Write ``output`` (Parquet: ``user_id``, ``item_ids``, ``scores``; a row a row of
    ``histories``).

    Several processes share the parts; the first one joins them.

    Raises:
        ConfigError: The output exists or cannot be written, or parts of another call lie beside it.
        DataError: A row that cannot be answered; what is done so far stays.
    """
    if output.suffix != ".parquet":
        raise ConfigError(f"{output} does not end in .parquet.", remedy="Name a Parquet file.")
    work = Work(model, histories, output, options, count_rows(histories))
    if _is_complete(work):
        return
    _begin(work, rank)
    progress = _Progress(work, log if rank == 0 else lambda _: None)
    mine = {number for number in work.missing if number % world_size == rank}
    try:
        for number, rows in enumerate(_parts(histories)):
            if number in mine:
                _write_part(work, number, rows)
                progress.show()
    except MltfrError:
        if world_size == 1 and len(work.missing) == work.num_parts:
            shutil.rmtree(work.folder)  # a corrected call finds nothing of this one
        raise
    if rank:
        return
    while work.missing:  # other processes; where one fails, the launcher ends all
        time.sleep(WAIT_SECONDS)
        progress.show()
    progress.end()
    dropped = _join(work)
    log(
        f"{output}: {work.num_rows:,} users, up to {options.k} items each"
        + f"; {dropped:,} unknown item ids were left out" * (dropped > 0)
    )


def _is_complete(work: Work) -> bool:
    """Whether an earlier call came to its end but for the parts, which go now.

    Raises:
        ConfigError: The output is there, and not from such a call.
    """
    if not work.output.exists():
        return False
    plan = work.folder / PLAN
    if not plan.exists() or plan.read_text() != work.plan():
        rule, remedy = "Recommendations never overwrite.", "Name another file, or delete it."
        raise ConfigError(f"{work.output} exists.", rule=rule, remedy=remedy)
    shutil.rmtree(work.folder)
    return True


def _begin(work: Work, rank: int) -> None:
    """Make the folder of parts, or go on in it.

    Raises:
        ConfigError: Its parts belong to another call.
    """
    plan, text = work.folder / PLAN, work.plan()
    if rank == 0 and not plan.exists():
        with writing(work.output):
            work.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(plan, text)
    while not plan.exists():
        time.sleep(WAIT_SECONDS)
    stored = plan.read_text()
    if not _goes_on(stored, text):
        raise ConfigError(
            f"{work.folder} holds parts of another call: other histories, options or model.",
            rule="Parts of one output are made alike.",
            remedy="Repeat that call to its end, or delete the folder to begin anew.",
        )
    if rank == 0:
        with writing(work.output):
            write_atomically(plan, text)


def _goes_on(stored: str, asked: str) -> bool:
    """Whether parts fit: made where `unknown` or `empty` refuses, no row asks for either."""
    before, now = json.loads(stored), json.loads(asked)
    for option in ("unknown", "empty"):
        if before["options"].get(option) == "refuse":
            before["options"][option] = now["options"][option]
    return bool(before == now)


def _parts(histories: Path) -> Iterator[list[Row]]:
    rows = read_rows(histories)
    while block := list(islice(rows, PART_ROWS)):
        yield block


def _write_part(work: Work, number: int, rows: list[Row]) -> None:
    told = _encoded(work, rows)
    options = work.options
    lists = work.model.recommend(
        told, options.k, filter_seen=options.filter_seen, empty=options.empty
    )
    kept = lists.numbers > 0
    scores = [row[k].tolist() for row, k in zip(lists.scores, kept, strict=True)]
    columns = {
        "user_id": pa.array([row.user for row in rows], user_type(work.histories)),
        "item_ids": pa.array(lists.item_ids, pa.list_(pa.string())),
        "scores": pa.array(scores, pa.list_(pa.float32())),
    }
    table = pa.table(columns).replace_schema_metadata({DROPPED: str(told.dropped).encode()})
    with writing(work.output), replacing(work.part(number)) as partial:
        pq.write_table(table, partial, compression="zstd")


def _encoded(work: Work, rows: list[Row]) -> Histories:
    """The numbers of a part's items.

    Raises:
        DataError: A row's history is no list of known ids, or empty; the row is named.
    """
    numbers, dropped, items = [], 0, work.model.items
    for row in rows:
        where = f" in row {row.number} of {work.histories}"
        try:
            raw_ids = as_texts([] if row.history is None else row.history)
        except DataError as error:
            raise DataError(
                f"{error.what[:-1]}{where}.", rule=error.rule, remedy=error.remedy
            ) from None
        item_ids = items.find(raw_ids)
        if not all(item_ids) and work.options.unknown == "refuse":
            raise items.unknown(raw_ids, item_ids, where, "`--unknown drop`")
        known = [number for number in item_ids if number]
        if not known and work.options.empty == "refuse":
            raise DataError(
                f"No history{where}.",
                rule="A model reads at least one item that it knows.",
                remedy="Leave the row out; `--empty popular` answers by popularity.",
            )
        dropped += len(item_ids) - len(known)
        numbers.append(known)
    return Histories(numbers, None, dropped)


def _join(work: Work) -> int:
    """Parts to the output; returns how many ids were dropped."""
    dropped = 0
    with writing(work.output), replacing(work.output) as partial:
        schema = pq.read_schema(work.part(0)).remove_metadata() if work.num_parts else None
        with pq.ParquetWriter(partial, schema or _empty_schema(work), compression="zstd") as file:
            for number in range(work.num_parts):
                table = pq.read_table(work.part(number))
                dropped += int(table.schema.metadata[DROPPED])
                file.write_table(table.replace_schema_metadata(None))
    shutil.rmtree(work.folder)
    return dropped


def _empty_schema(work: Work) -> Any:
    lists = {"item_ids": pa.list_(pa.string()), "scores": pa.list_(pa.float32())}
    return pa.schema({"user_id": user_type(work.histories), **lists})


class _Progress:
    """Users that are done, the rate, the time left."""

    def __init__(self, work: Work, log: Callable[[str], None]) -> None:
        self._work, self._line = work, StatusLine(sys.stderr, SECONDS_IN_LOG, log)
        self._began = self._said = time.monotonic()
        self._before = len(work.missing)
        if work.num_parts > self._before:
            log(f"{work.num_parts - self._before} of {work.num_parts} parts are done already")

    def show(self) -> None:
        now = time.monotonic()
        if now - self._said < self._line.pause:
            return
        missing = len(self._work.missing)  # looks for every part: not for each that is written
        done = self._before - missing
        if not done:
            return
        self._said, rate = now, done * PART_ROWS / (now - self._began)
        self._line.show(
            f"  {self._work.num_rows - missing * PART_ROWS:,} of {self._work.num_rows:,} users, "
            f"{rate:,.0f} a second, about {duration(missing * PART_ROWS / rate)} left"
        )

    def end(self) -> None:
        if self._said > self._began:
            self._line.wipe()


def model_hash(model: Ranker) -> str:
    """sha256 of the weights and the items."""
    digest = hashlib.sha256()
    for raw in model.item_ids:
        digest.update(f"{raw}\0".encode())
    for name, tensor in sorted(model.serving.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().numpy().data)
    return digest.hexdigest()
