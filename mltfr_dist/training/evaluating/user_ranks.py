"""`ranks.parquet`: the ranks of users' targets, so that runs can be compared when they are over.

One row a target and split, in the order of the prepared data, whatever the number of ranks:
``split`` (valid, test), ``user`` and ``target`` (raw ids), ``rank`` (1 is best; a fraction only
with ties "mean"), ``history_length`` (items of the full history), ``popularity`` (how often
training holds the target). The file's metadata, JSON under the key :data:`KEY`, says what it is of,
and by which rules it came about.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from mltfr_dist import __version__
from mltfr_dist.config import RunConfig
from mltfr_dist.data.shards.manifest import (
    ITEMS_NAME,
    MANIFEST_NAME,
    USERS_NAME,
    Manifest,
    open_map,
    read_map,
)
from mltfr_dist.data.shards.reader import read_shard
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.files import file_sha256, replacing
from mltfr_dist.tables.info import read_info
from mltfr_dist.training.evaluating.evaluate import Keep
from mltfr_dist.training.evaluating.slices import training_counts
from mltfr_dist.training.run_folder import CHANGEABLE, leaf_values

KEY = b"mltfr_ranks"
ITEMS_AT_ONCE = 1 << 20
"""Items whose ids are read together."""
SCHEMA = pa.schema(
    {
        "split": pa.dictionary(pa.int8(), pa.string()),
        "user": pa.string(),
        "target": pa.string(),
        "rank": pa.float64(),
        "history_length": pa.int32(),
        "popularity": pa.int64(),
    }
)


class UserRanks:
    """The ranks that a run has measured, by split."""

    def __init__(self) -> None:
        self._measured: dict[str, np.ndarray] = {}

    def of(self, split: str) -> Keep:
        """What keeps the ranks of ``split``, measured anew."""

        def keep(user_ranks: Tensor) -> None:
            self._measured[split] = user_ranks.numpy()

        return keep

    def write(
        self,
        path: Path,
        config: RunConfig,
        manifest: Manifest,
        ranks: Ranks,
        *,
        baseline: str = "",
    ) -> None:
        """Write what was kept to ``path``, in one step; all must call.

        Memory of rank 0: the ids of users and items, 8 bytes a target, and one shard.

        Args:
            path: The file, which it replaces.
            config: The run.
            manifest: Its prepared data.
            ranks: All processes.
            baseline: The model's name, where it is a baseline and not the run's own.
        """

        def write_file(heartbeat: Callable[[], object]) -> None:
            about = json.dumps(described(config, manifest, baseline))
            schema = SCHEMA.with_metadata({KEY: about.encode()})
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial, pq.ParquetWriter(partial, schema) as writer:
                for table in _tables(self._measured, config, manifest):
                    writer.write_table(table.cast(schema))
                    heartbeat()

        ranks.on_rank0(write_file)


def _tables(
    measured: dict[str, np.ndarray], config: RunConfig, manifest: Manifest
) -> Iterator[pa.Table]:
    """The rows, a shard's at a time; users and targets as the shards hold them."""
    folder = config.data.path
    read = read_map(folder, manifest, USERS_NAME, ["user_index", "user_id"])
    users = read.sort_by("user_index")["user_id"].combine_chunks()
    numbers, items = _ids_of_targets(tuple(measured), folder, manifest)
    counts, _ = training_counts(config, manifest)
    for split, values in measured.items():
        start = 0
        for info in manifest.splits[split].shards:
            sequences = read_shard(folder, info, num_items=manifest.num_items)
            rows, targets = sequences.distinct_targets()
            end = start + len(targets)
            yield pa.table(
                {
                    "split": pa.array([split] * len(targets)).dictionary_encode(),
                    "user": users.take(pa.array(sequences.users[rows])),
                    "target": items.take(pa.array(np.searchsorted(numbers, targets))),
                    "rank": values[start:end],
                    "history_length": (sequences.lengths - sequences.num_targets)[rows],
                    "popularity": counts[targets],
                }
            )
            start = end
        assert start == len(values)


def _ids_of_targets(
    splits: Sequence[str], folder: Path, manifest: Manifest
) -> tuple[np.ndarray, Any]:
    """Numbers of the targets of some splits, ascending, and their raw ids: of all items' ids some
    are read at a time.
    """
    of_shards = [np.zeros(0, np.int64)]
    for info in (info for split in splits for info in manifest.splits[split].shards):
        sequences = read_shard(folder, info, num_items=manifest.num_items)
        of_shards.append(np.unique(sequences.distinct_targets()[1]))
    numbers = np.unique(np.concatenate(of_shards))
    ids: list[Any] = [pa.array([], pa.string())]
    with open_map(folder, manifest, ITEMS_NAME) as file:
        for batch in file.iter_batches(ITEMS_AT_ONCE, columns=["item_index", "item_id"]):
            here = batch["item_index"].to_numpy()
            assert (np.diff(here) > 0).all(), "items go by their numbers"
            wanted = numbers[slice(*np.searchsorted(numbers, (here[0], here[-1] + 1)))]
            ids.append(batch["item_id"].take(pa.array(wanted - here[0])))
    return numbers, pa.chunked_array(ids, pa.string()).combine_chunks()


def described(config: RunConfig, manifest: Manifest, baseline: str = "") -> dict[str, Any]:
    """What a file of ranks is of: its model, and the rules by which its ranks came about."""
    own = "" if baseline else config.backbone.name + " + MLTFR" * config.mltfr.enabled
    return {
        "model": baseline or own,
        "model_sha256": model_sha256(config, baseline),
        "seed": None if baseline else config.training.seed,
        "picked_on": config.picks_on,
        "select_by": config.evaluation.select_by,
        "mltfr_dist": __version__,
        "protocol": protocol(config, manifest),
    }


def protocol(config: RunConfig, manifest: Manifest) -> dict[str, Any]:
    """What two runs must share for their ranks to be comparable, in words."""
    left_out = ", ".join(config.data.left_out) or "nothing"
    return {
        "data": f"manifest {file_sha256(config.data.path / MANIFEST_NAME)}, left out: {left_out}",
        "split": manifest.prepare.split_in_words,
        "candidates": f"all {manifest.num_items} items",
        "seen items": "left out" if config.evaluation.filter_seen else "kept",
        "ties": config.evaluation.ties,
    }


def model_sha256(config: RunConfig, baseline: str = "") -> str:
    """Hash of what makes a model, its seed aside: runs of equal hash are one model's."""
    left = {*CHANGEABLE, "baselines", "training.seed", "data.path"}  # `protocol` has the data
    values: Any = {key: value for key, value in leaf_values(config).items() if key not in left}
    tables = config.mltfr.tables if config.mltfr.enabled else ()
    values["mltfr.tables"] = [read_info(path).rows_sha256 for path in tables]  # wherever they lie
    return hashlib.sha256(json.dumps(baseline or values, sort_keys=True).encode()).hexdigest()
