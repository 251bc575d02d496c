"""Every training interaction counts, those of one-item training parts too, which no shard holds."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from support import tiny_config

from mltfr_dist.config import PrepareConfig
from mltfr_dist.data.batch import RankingBatch
from mltfr_dist.data.prepare.run import prepare
from mltfr_dist.data.shards.manifest import load_manifest
from mltfr_dist.data.shards.short_parts import one_item_parts, training_sequences
from mltfr_dist.distributed.ranks import ALONE
from mltfr_dist.files import file_sha256
from mltfr_dist.training.evaluating.baselines import popularity
from mltfr_dist.training.evaluating.slices import training_slices
from mltfr_dist.training.inputs import load_inputs
from mltfr_dist.training.reporting.report import opening

SPLITS = ("leave_one_out", "global_temporal")


def histories() -> dict[str, list[tuple[int, str]]]:
    """(time, item) of 60 users, a third of whom have one to three interactions."""
    draw = np.random.default_rng(3)
    result = {}
    for user in range(60):
        length = int(draw.integers(1, 4) if user % 3 == 0 else draw.integers(4, 9))
        times = np.sort(draw.choice(1000, length, replace=False))
        items = [f"i{item}" for item in draw.geometric(0.15, length)]
        items[0] = f"i{draw.integers(20)}"
        result[f"u{user}"] = list(zip(times.tolist(), items))
    return result


def prepared(folder: Path, split: str) -> tuple[Path, Counter[str]]:
    """The folder of :func:`histories`, and how often each item occurs in training, by the rule."""
    users = histories()
    rows = [f"{user},{item},{time}" for user, history in users.items() for time, item in history]
    (folder / "raw.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")
    config = PrepareConfig(
        split=split,
        user_core=1,
        item_core=1,
        duplicates="keep",
        times="any",
        sequences_per_shard=16,
        sequences_per_block=8,
    )
    manifest = prepare(str(folder / "raw.csv"), folder / "data", config, log=lambda _: None)
    counted: Counter[str] = Counter()
    for history in users.values():
        if split == "leave_one_out":
            kept = history[:-2] if len(history) >= 3 else history
        else:
            assert manifest.report.cut_times is not None
            kept = [pair for pair in history if pair[0] < float(manifest.report.cut_times[0])]
        counted.update(item for _, item in kept)
    assert manifest.report.short_train_sequences > 5
    return folder / "data", counted


def counts_by_name(folder: Path, counts: np.ndarray) -> Counter[str]:
    names = pq.read_table(folder / "items.parquet")["item_id"].to_pylist()
    return Counter({name: int(counts[i + 1]) for i, name in enumerate(names)})


def make_old(folder: Path) -> None:
    """As it was prepared before: `items.parquet` counts what the training shards hold."""
    manifest = load_manifest(folder)
    path = folder / "items.parquet"
    table = pq.read_table(path)
    stored = np.bincount(
        training_sequences(folder, manifest).items[: manifest.splits["train"].num_items],
        minlength=manifest.num_items + 1,
    )
    place = table.column_names.index("count")
    pq.write_table(table.set_column(place, "count", pa.array(stored[1:])), path)
    values = manifest.model_dump(mode="json", exclude={"checksum"}) | {"schema_version": 2}
    values["files"][path.name] = file_sha256(path)
    (folder / "manifest.json").write_text(json.dumps(values))


@pytest.mark.parametrize("split", SPLITS)
def test_popularity_and_the_thirds_count_every_training_interaction(
    tmp_path: Path, split: str
) -> None:
    folder, expected = prepared(tmp_path, split)
    manifest = load_manifest(folder)
    train = training_sequences(folder, manifest)
    assert (train.lengths == 1).sum() == manifest.report.short_train_sequences
    none = torch.zeros(0, dtype=torch.int64)
    batch = RankingBatch(torch.ones(1, 1).long(), torch.ones(1).long(), none, none)
    scores = popularity(train, manifest.num_items)(batch)[0].numpy()
    assert counts_by_name(folder, np.where(np.isinf(scores), 0, scores)) == expected
    assert counts_by_name(folder, np.concatenate([[0], recorded(folder)])) == expected

    config = tiny_config(tmp_path / "tiny", data__path=str(folder))
    third = training_slices(config, manifest).item_third.numpy()
    of_third = [scores[1:][third[1:] == t] for t in range(3)]
    assert of_third[0].max() <= of_third[1].min() <= of_third[1].max() <= of_third[2].min()


def recorded(folder: Path) -> np.ndarray:
    counts: np.ndarray = pq.read_table(folder / "items.parquet")["count"].to_numpy()
    return counts


@pytest.mark.parametrize("split", SPLITS)
def test_a_folder_prepared_before_counts_what_it_shows_and_says_so(
    tmp_path: Path, split: str
) -> None:
    folder, expected = prepared(tmp_path, split)
    config = tiny_config(tmp_path / "tiny", data__path=str(folder))
    assert "training parts of one item" not in opening(config, load_inputs(config), ALONE)
    make_old(folder)
    manifest = load_manifest(folder)
    train = training_sequences(folder, manifest)
    result = np.bincount(train.items, minlength=manifest.num_items + 1)
    missing = expected - counts_by_name(folder, result)  # of users without a validation target
    assert 0 < missing.total() < manifest.report.short_train_sequences
    assert counts_by_name(folder, result) - expected == Counter()
    assert "training parts of one item" in opening(config, load_inputs(config), ALONE)


def test_what_is_left_out_does_not_count(tmp_path: Path) -> None:
    folder, expected = prepared(tmp_path, "leave_one_out")
    whole = load_manifest(folder)
    left_out = whole.splits["train"].shards[0]
    manifest = load_manifest(folder, left_out=[left_out.file])
    train = training_sequences(folder, manifest)
    counts = np.bincount(train.items, minlength=manifest.num_items + 1)
    lacking = expected - counts_by_name(folder, counts)
    alone = sum(len(history) == 1 for history in histories().values())
    assert lacking.total() == left_out.num_items + alone


def test_without_short_parts_nothing_is_read(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    manifest = load_manifest(config.data.path)
    short = manifest.report.model_copy(update={"short_train_sequences": 0})
    manifest = manifest.model_copy(update={"report": short})
    assert len(one_item_parts(tmp_path / "nowhere", manifest, np.zeros(1, np.int64))) == 0
