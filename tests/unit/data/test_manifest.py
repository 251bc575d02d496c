"""A manifest that was edited, or lies beside other files than its own, is refused by whoever reads
it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import write_data

from mltfr_dist.cli import main as mltfr
from mltfr_dist.config import PrepareConfig
from mltfr_dist.data.prepare.run import prepare
from mltfr_dist.data.shards.manifest import ITEMS_NAME, load_manifest, read_manifest, read_map
from mltfr_dist.data.shards.manifest_schema import checksum_of
from mltfr_dist.data.shards.reader import read_shard
from mltfr_dist.errors import DataError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("manifest"))


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "data")
    return tmp_path / "data"


def values_of(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return values


def put(folder: Path, values: dict[str, Any]) -> None:
    (folder / "manifest.json").write_text(json.dumps(values))


def as_version_2(values: dict[str, Any]) -> dict[str, Any]:
    """As it was written before there were checksums."""
    return {k: v for k, v in values.items() if k != "checksum"} | {"schema_version": 2}


def leaves(values: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Paths of all values that are no object or list."""
    if isinstance(values, dict | list):
        pairs = values.items() if isinstance(values, dict) else enumerate(values)
        return [leaf for key, value in pairs for leaf in leaves(value, (*path, key))]
    return [path]


def at(values: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        values = values[key]
    return values


def test_every_single_value_is_under_the_checksum(folder: Path) -> None:
    original = values_of(folder)
    paths = leaves(original)
    assert len(paths) > 200
    for path in paths:
        values = json.loads(json.dumps(original))
        value = at(values, path)
        at(values, path[:-1])[path[-1]] = value + 1 if isinstance(value, int) else f"{value}x"
        put(folder, values)
        with pytest.raises(DataError, match=r"manifest\.json") as caught:
            load_manifest(folder)
        assert "Copy the folder again" in caught.value.remedy or "Run `mltfr prepare` again" in (
            caught.value.remedy
        )
    put(folder, original)  # set in another way, and the same values
    assert load_manifest(folder).num_items == original["num_items"]


def test_the_checksum_is_of_canonical_json(folder: Path) -> None:
    values = values_of(folder)
    assert values.pop("checksum") == checksum_of(dict(reversed(values.items())))
    assert values["schema_version"] == 3
    put(folder, values)
    with pytest.raises(DataError, match=r"not what `mltfr prepare` wrote.*it holds None"):
        load_manifest(folder)


def lowered(values: dict[str, Any]) -> None:
    lengths = values["splits"]["train"]["shards"][0]["lengths"]
    lengths[0][1] -= 1


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "num_items raised": lambda v: v.update(num_items=v["num_items"] + 1),
    "num_items lowered": lambda v: v.update(num_items=v["num_items"] - 1),
    "no items": lambda v: v.update(num_items=0),
    "negative items": lambda v: v.update(num_items=-1),
    "num_users raised": lambda v: v.update(num_users=v["num_users"] + 1),
    "no users": lambda v: v.update(num_users=0),
    "fewer users than sequences": lambda v: v.update(num_users=7),
    "no interactions": lambda v: v.update(num_interactions=0),
    "fewer interactions than items": lambda v: v.update(num_interactions=9),
    "a length's count lowered": lowered,
    "lengths gone": lambda v: v["splits"]["train"]["shards"][0].update(lengths=[]),
    "lengths in disorder": lambda v: v["splits"]["valid"]["shards"][0]["lengths"].reverse(),
    "max_length lowered": lambda v: v["splits"]["train"].update(max_length=1),
    "max_length raised": lambda v: v["splits"]["test"].update(max_length=10**12),
    "num_sequences of a split": lambda v: v["splits"]["train"].update(num_sequences=-1),
    "a shard gone": lambda v: v["splits"]["train"]["shards"].pop(),
    "negative report": lambda v: v["report"].update(ties=-1),
    "no maps": lambda v: v.update(files={}),
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("command", ["inspect", "load"])
def test_numbers_of_before_are_recomputed(
    folder: Path, name: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Version 2 has no checksum: sums and the files themselves tell."""
    values = as_version_2(values_of(folder))
    put(folder, values)
    assert load_manifest(folder).checksum is None
    CHANGES[name](values)
    put(folder, values)
    if command == "load":
        with pytest.raises(DataError):
            load_manifest(folder)
    else:
        assert mltfr(["inspect", str(folder)]) == 2
        message = capsys.readouterr().err
        assert message.startswith("DataError")
        assert message.count("\n") == 1


def test_lengths_are_compared_when_a_shard_is_read(folder: Path) -> None:
    """Another distribution with the same sums: one longer, one shorter."""
    manifest = read_manifest(folder)
    info = manifest.splits["train"].shards[0]
    assert info.lengths is not None
    counts = dict(info.lengths)
    short = min(counts)
    for size, change in ((short, -1), (short + 1, 2), (short + 2, -1)):
        counts[size] = counts.get(size, 0) + change
    lengths = tuple(sorted((size, count) for size, count in counts.items() if count))
    changed = info.model_copy(update={"lengths": lengths})
    with pytest.raises(DataError, match="other lengths than the manifest says"):
        read_shard(folder, changed, num_items=manifest.num_items)


def test_a_folder_of_before_is_verified_and_reused(tmp_path: Path) -> None:
    write_data(tmp_path)
    config = PrepareConfig(
        format="sequences",
        titles=tmp_path / "titles.csv",
        user_core=1,
        item_core=1,
        sequences_per_block=16,
        sequences_per_shard=32,
    )
    put(tmp_path / "data", as_version_2(values_of(tmp_path / "data")))
    before = (tmp_path / "data" / "manifest.json").read_bytes()
    lines: list[str] = []
    prepare(str(tmp_path / "interactions.txt"), tmp_path / "data", config, log=lines.append)
    assert "verified and reused" in lines[0]
    assert (tmp_path / "data" / "manifest.json").read_bytes() == before


def test_a_map_is_hashed_and_parsed_from_the_same_bytes(folder: Path) -> None:
    manifest = read_manifest(folder)
    table = read_map(folder, manifest, ITEMS_NAME)
    assert table["item_index"].to_pylist() == list(range(1, manifest.num_items + 1))
    titles = table["title"].to_pylist()
    shifted = table.set_column(2, "title", pa.array([*titles[1:], titles[0]]))
    pq.write_table(shifted, folder / ITEMS_NAME)
    load_manifest(folder)  # as many rows as before
    with pytest.raises(DataError, match=r"items\.parquet is damaged: .* last written on 20"):
        read_map(folder, manifest, ITEMS_NAME)
    (folder / ITEMS_NAME).write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"items\.parquet is damaged"):
        load_manifest(folder)
    (folder / ITEMS_NAME).unlink()
    with pytest.raises(DataError, match=r"items\.parquet is missing"):
        load_manifest(folder)
    with pytest.raises(DataError, match=r"items\.parquet cannot be read: No such file"):
        read_map(folder, manifest, ITEMS_NAME)
