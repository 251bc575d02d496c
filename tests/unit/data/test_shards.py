"""Shards: what is on disk, what is refused."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from mltfr_dist.config import PrepareConfig
from mltfr_dist.data.shards.manifest import (
    Manifest,
    PrepareReport,
    ShardInfo,
    SourceInfo,
    SplitInfo,
    load_manifest,
    verify_folder,
)
from mltfr_dist.data.shards.packed import PackedSequences
from mltfr_dist.data.shards.reader import read_shard
from mltfr_dist.data.shards.writer import SplitWriter
from mltfr_dist.errors import DataError
from mltfr_dist.files import file_sha256

SEQUENCES = {0: [3, 1, 2], 2: [2], 3: [1, 1], 7: [3, 3, 3, 3], 9: [2, 1]}


def packed_of(sequences: dict[int, list[int]]) -> PackedSequences:
    items = np.array([item for items in sequences.values() for item in items], dtype=np.int64)
    offsets = np.cumsum([0, *map(len, sequences.values())])
    return PackedSequences(items, offsets, np.array(list(sequences)))


def write(
    folder: Path,
    sequences: dict[int, list[int]] = SEQUENCES,
    *,
    block: int = 2,
    shard: int = 3,
    chunk: int = 4,
) -> SplitInfo:
    sizes = {
        "num_items": 3,
        "num_users": 10,
        "sequences_per_block": block,
        "sequences_per_shard": shard,
    }
    writer = SplitWriter(folder, "train", **sizes)
    for start in range(0, len(sequences), chunk):
        writer.add(packed_of(dict(list(sequences.items())[start : start + chunk])))
    return writer.finish()


def as_dict(packed: PackedSequences) -> dict[int, list[int]]:
    return {int(packed.users[index]): packed[index].tolist() for index in range(len(packed))}


def write_manifest(folder: Path, split: SplitInfo) -> Manifest:
    pq.write_table(pa.table({"item_index": [1, 2, 3]}), folder / "items.parquet")
    pq.write_table(pa.table({"user_index": range(10)}), folder / "users.parquet")
    empty = SplitInfo(num_sequences=0, num_items=0, max_length=0, shards=())
    unsealed = Manifest(
        num_users=10,
        num_items=3,
        num_interactions=12,
        splits={"train": split, "valid": empty, "test": empty},
        source=SourceInfo(file="a.csv", bytes=1, sha256="0"),
        prepare=PrepareConfig(),
        report=PrepareReport(
            rows_read=12,
            duplicates_dropped=0,
            core_rounds=(),
            ties=0,
            train_only_users=0,
            short_train_sequences=0,
            cold_targets={},
        ),
        files={name: file_sha256(folder / name) for name in ("items.parquet", "users.parquet")},
    )
    manifest = unsealed.sealed()
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    return manifest


def tar_of(folder: Path, members: dict[str, bytes], **counts: int) -> ShardInfo:
    path = folder / "train-000000.tar"
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    values = {"num_sequences": 2, "num_blocks": 1, "num_items": 3} | counts
    return ShardInfo(file=path.name, bytes=path.stat().st_size, sha256=file_sha256(path), **values)


def npy(values: object, dtype: object = np.uint8) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(values, dtype=dtype), allow_pickle=True)
    return buffer.getvalue()


def members(**changes: bytes) -> dict[str, bytes]:
    blocks = {
        "items": npy([1, 2, 3]),
        "offsets": npy([0, 1, 3], np.uint32),
        "users": npy([0, 1]),
    } | changes
    return {f"train-00000000.{name}.npy": content for name, content in blocks.items()}


def test_layout_read_with_tarfile_and_numpy_alone(tmp_path):
    split = write(tmp_path)
    assert [shard.file for shard in split.shards] == ["train-000000.tar", "train-000001.tar"]
    assert (split.num_sequences, split.num_items, split.max_length) == (5, 12, 4)
    assert [(shard.num_sequences, shard.num_blocks, shard.num_items) for shard in split.shards] == [
        (3, 2, 6),
        (2, 1, 6),
    ]
    result = {}
    for shard in split.shards:
        with tarfile.open(tmp_path / shard.file) as tar:
            names = tar.getnames()
            for entry in tar:
                assert (entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname) == (
                    0,
                    0,
                    0,
                    "",
                    "",
                )
            for key in sorted({name.partition(".")[0] for name in names}):
                arrays = [
                    np.load(io.BytesIO(tar.extractfile(f"{key}.{block}.npy").read()))
                    for block in ("items", "offsets", "users")
                ]
                assert [array.dtype for array in arrays] == [np.uint8, np.uint32, np.uint8]
                items, offsets, users = arrays
                assert offsets[0] == 0
                for index, user in enumerate(users):
                    result[int(user)] = items[offsets[index] : offsets[index + 1]].tolist()
    assert result == SEQUENCES


def test_layout_read_with_webdataset_alone(tmp_path):
    split = write(tmp_path)
    urls = [str(tmp_path / shard.file) for shard in split.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode())
    assert [sample["__key__"] for sample in samples] == [f"train-{index:08d}" for index in range(3)]
    assert np.concatenate([sample["items.npy"] for sample in samples]).tolist() == [
        item for items in SEQUENCES.values() for item in items
    ]
    assert np.concatenate([sample["users.npy"] for sample in samples]).tolist() == list(SEQUENCES)


def test_read_shard(tmp_path):
    split = write(tmp_path)
    packed = [read_shard(tmp_path, shard, num_items=3) for shard in split.shards]
    assert packed[0].offsets.dtype == np.int64
    assert as_dict(PackedSequences.concatenate(packed)) == SEQUENCES


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=20),
    block=st.integers(1, 6),
    shard=st.integers(1, 9),
    chunk=st.integers(1, 9),
)
def test_any_sizes_give_all_sequences_in_order(tmp_path_factory, lengths, block, shard, chunk):
    folder = tmp_path_factory.mktemp("shards")
    sequences = {
        user // 2: [1 + (user + index) % 3 for index in range(n)]
        for user, n in zip(range(0, 40, 2), lengths)
    }
    sequences = dict(list(sequences.items())[:10])
    split = write(folder, sequences, block=block, shard=shard, chunk=chunk)
    blocks = [read_shard(folder, info, num_items=3) for info in split.shards]
    assert all(len(piece) == shard for piece in blocks[:-1])
    assert list(as_dict(PackedSequences.concatenate(blocks)).items()) == list(sequences.items())


def test_types_are_the_smallest_that_fit(tmp_path):
    writer = SplitWriter(
        tmp_path,
        "test",
        num_items=256,
        num_users=70_000,
        sequences_per_block=1,
        sequences_per_shard=1,
    )
    writer.add(packed_of({0: [256, 1]}))
    split = writer.finish()
    packed = read_shard(tmp_path, split.shards[0], num_items=256)
    assert (packed.items.dtype, packed.users.dtype) == (np.uint16, np.uint32)


def test_take_and_getitem():
    packed = PackedSequences(
        np.array([5, 6, 7, 8, 9, 4]), np.array([0, 2, 3, 6]), np.array([10, 11, 12])
    )
    taken = packed.take([2, 0, 2])
    assert taken.items.tolist() == [8, 9, 4, 5, 6, 8, 9, 4]
    assert taken.offsets.tolist() == [0, 3, 5, 8]
    assert taken.users.tolist() == [12, 10, 12]
    assert packed[-1].tolist() == [8, 9, 4]
    assert packed[0].base is packed.items
    assert len(packed.take([])) == 0
    with pytest.raises(IndexError):
        packed[3]


def test_truncation_at_a_tar_block_is_found(tmp_path):
    info = write(tmp_path).shards[0]
    path = tmp_path / info.file
    path.write_bytes(path.read_bytes()[: 3 * 1024])
    with pytest.raises(
        DataError, match=r"train-000000\.tar is damaged: it has 3,072 bytes.*prepare"
    ):
        read_shard(tmp_path, info, num_items=3)
    cut = info.model_copy(update={"bytes": 3072, "sha256": file_sha256(path)})
    with pytest.raises(
        DataError, match="damaged"
    ):  # even with matching size and hash: the content is short
        read_shard(tmp_path, cut, num_items=3)


def test_every_flipped_byte_is_found(tmp_path):
    info = write(tmp_path).shards[0]
    path = tmp_path / info.file
    content = path.read_bytes()
    for position in range(0, len(content), 997):
        changed = bytearray(content)
        changed[position] ^= 1
        path.write_bytes(changed)
        with pytest.raises(DataError, match="its sha256 begins"):
            read_shard(tmp_path, info, num_items=3)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (members(items=npy([1, 2, 4])), "item ids are 1..4, not within 1..3"),
        (members(items=npy([0, 2, 3])), "item ids are 0..3"),
        (members(items=npy([1, 2, 3], np.int64)), "items.npy is int64"),
        (members(items=npy([[1, 2, 3]])), "not a flat unsigned array"),
        (members(offsets=npy([0, 3, 1])), "offsets do not rise"),
        (members(offsets=npy([0, 1, 2])), "offsets do not rise"),
        (members(offsets=npy([1, 2, 3])), "offsets do not rise"),
        (members(offsets=npy([0, 3])), "offsets do not rise"),
        (members(users=npy([None, None], object)), "allow_pickle=False"),
        (members() | {"train-00000000.code.pickle": b"x"}, "code.pickle"),
        ({name: content for name, content in members().items() if "users" not in name}, "holds"),
        (members(items=b"no array"), "damaged"),
        ({}, r"are \(0, 0, 0\)"),
    ],
)
def test_malformed_blocks_are_refused(tmp_path, content, words):
    with pytest.raises(DataError, match=words):
        read_shard(tmp_path, tar_of(tmp_path, content), num_items=3)


def test_counts_must_agree(tmp_path):
    assert len(read_shard(tmp_path, tar_of(tmp_path, members()), num_items=3)) == 2
    for count in ("num_sequences", "num_blocks", "num_items"):
        with pytest.raises(DataError, match=r"\(blocks, sequences, items\) are \(1, 2, 3\)"):
            read_shard(tmp_path, tar_of(tmp_path, members(), **{count: 9}), num_items=3)


def test_a_shard_name_never_leaves_the_folder():
    good = {"num_sequences": 1, "num_blocks": 1, "num_items": 1, "bytes": 1, "sha256": "0"}
    for name in ("../x.tar", "/x.tar", "pipe:ls", "a/b.tar", "", ".."):
        with pytest.raises(ValueError, match="pattern"):
            ShardInfo(file=name, **good)


def test_manifest_round_trip_and_full_verification(tmp_path):
    manifest = write_manifest(tmp_path, write(tmp_path))
    assert load_manifest(tmp_path) == manifest == verify_folder(tmp_path)
    pq.write_table(pa.table({"item_index": [2, 1, 3]}), tmp_path / "items.parquet")
    assert load_manifest(tmp_path) == manifest
    with pytest.raises(DataError, match=r"items\.parquet is damaged"):
        verify_folder(tmp_path)


def test_manifest_refusals(tmp_path):
    with pytest.raises(DataError, match=r"holds no manifest\.json"):
        load_manifest(tmp_path)
    manifest = write_manifest(tmp_path, write(tmp_path))
    path = tmp_path / "manifest.json"
    values = manifest.model_dump(mode="json")
    for content, words in [
        ("{", "malformed"),
        ("[]", "not a JSON object"),
        (
            json.dumps(values | {"schema_version": 5}),
            "schema version 5; this program reads 1, 2, 3, 4",
        ),
        (json.dumps(values | {"num_items": "many"}), "`num_items`"),
        (json.dumps(values | {"extra": 1}), "`extra`"),
        (json.dumps(values | {"splits": {}}), "must be exactly train, valid, test"),
    ]:
        path.write_text(content)
        with pytest.raises(DataError, match=words):
            load_manifest(tmp_path)
    path.write_text(json.dumps(values))
    shard = tmp_path / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(DataError, match=r"train-000001\.tar is damaged: it has"):
        load_manifest(tmp_path)
    shard.unlink()
    with pytest.raises(DataError, match=r"train-000001\.tar is missing"):
        load_manifest(tmp_path)
