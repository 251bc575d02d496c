"""Preparation end to end, on tables small enough to work by hand."""

from __future__ import annotations

import hashlib
from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest

from mltfr_dist.config import PrepareConfig
from mltfr_dist.data.prepare.run import prepare
from mltfr_dist.data.prepare.steps import drop_duplicates, k_core
from mltfr_dist.data.shards.manifest import CoreRound, Manifest, load_manifest
from mltfr_dist.data.shards.packed import PackedSequences
from mltfr_dist.data.shards.reader import read_shard
from mltfr_dist.errors import DataError

ALL = {"user_core": 1, "item_core": 1}
SMALL = """user_id,item_id,timestamp
ann,x,4
bob,y,1
ann,y,2
ann,z,2
bob,x,2
ann,x,1
bob,z,3
bob,w,4
cat,z,1
cat,x,1
"""


def put(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def run(tmp_path: Path, text: str, name: str = "out", **values: object) -> Manifest:
    config = PrepareConfig(**(ALL | values))
    return prepare(put(tmp_path / "raw.csv", text), tmp_path / name, config, log=lambda _: None)


def named(folder: Path, manifest: Manifest, split: str) -> dict[str, list[str]]:
    """Sequences of a split with the ids of the raw file."""
    items = dict(
        zip(
            *(
                pq.read_table(folder / "items.parquet")[name].to_pylist()
                for name in ("item_index", "item_id")
            )
        )
    )
    users = dict(
        zip(
            *(
                pq.read_table(folder / "users.parquet")[name].to_pylist()
                for name in ("user_index", "user_id")
            )
        )
    )
    shards = [
        read_shard(folder, shard, num_items=manifest.num_items)
        for shard in manifest.splits[split].shards
    ]
    packed = PackedSequences.concatenate(shards)
    return {
        users[int(packed.users[i])]: [items[int(item)] for item in packed[i]]
        for i in range(len(packed))
    }


def core_of(
    pairs: list[tuple[str, str]], user_core: int, item_core: int
) -> tuple[set, tuple[CoreRound, ...]]:
    with duckdb.connect() as connection:
        connection.execute(
            "CREATE TABLE interactions(row_number BIGINT, user_id VARCHAR, item_id VARCHAR, "
            "timestamp BIGINT)"
        )
        rows = [(index, user, item, 0) for index, (user, item) in enumerate(pairs)]
        connection.executemany("INSERT INTO interactions VALUES (?, ?, ?, ?)", rows)
        drop_duplicates(connection, "keep")
        rounds = k_core(connection, user_core, item_core)
        query = (
            "SELECT user_id, item_id FROM events JOIN user_codes USING (user_code) JOIN "
            "item_codes USING (item_code)"
        )
        return set(connection.execute(query).fetchall()), rounds


def test_by_hand_ties_keep_file_order_and_ids_go_by_training_count(tmp_path):
    manifest = run(tmp_path, SMALL)
    folder = tmp_path / "out"
    # ann: x@1, y@2, z@2 (tie, file order), x@4.  bob: y x z w.  cat: z x (tie), training only.
    assert named(folder, manifest, "train") == {
        "ann": ["x", "y"],
        "bob": ["y", "x"],
        "cat": ["z", "x"],
    }
    assert named(folder, manifest, "valid") == {"ann": ["x", "y", "z"], "bob": ["y", "x", "z"]}
    assert named(folder, manifest, "test") == {
        "ann": ["x", "y", "z", "x"],
        "bob": ["y", "x", "z", "w"],
    }
    # Training occurrences: x 3, y 2, z 1, w 0.
    assert pq.read_table(folder / "items.parquet").to_pydict() == {
        "item_index": [1, 2, 3, 4],
        "item_id": ["x", "y", "z", "w"],
        "title": [None] * 4,
        "count": [3, 2, 1, 0],
    }
    assert pq.read_table(folder / "users.parquet").to_pydict() == {
        "user_index": [0, 1, 2],
        "user_id": ["ann", "bob", "cat"],
        "length": [4, 4, 2],
    }
    assert (manifest.num_users, manifest.num_items, manifest.num_interactions) == (3, 4, 10)
    report = manifest.report
    assert (report.rows_read, report.ties, report.train_only_users) == (10, 2, 1)
    assert report.cold_targets == {"valid": 0, "test": 1}
    assert load_manifest(folder) == manifest


def test_global_temporal(tmp_path):
    text = "user_id,item_id,timestamp\n" + "".join(
        f"{user},{item},2024-01-0{day}\n"
        for user, item, day in [
            ("a", "p", 1),
            ("a", "q", 2),
            ("b", "q", 2),
            ("b", "p", 3),
            ("a", "r", 5),
            ("b", "p", 7),
            ("a", "p", 8),
        ]
    )
    manifest = run(tmp_path, text, split="global_temporal", valid_fraction=0.2, test_fraction=0.3)
    folder = tmp_path / "out"
    assert named(folder, manifest, "train") == {"a": ["p", "q"]}
    assert named(folder, manifest, "valid") == {"b": ["q", "p"]}
    assert named(folder, manifest, "test") == {"a": ["p", "q", "r"], "b": ["q", "p", "p"]}
    assert manifest.report.cut_times == ("1704240000000000", "1704412800000000")
    assert manifest.report.short_train_sequences == 1


@pytest.mark.parametrize(
    ("mode", "expected"), [("exact", "p q p p"), ("first", "p q"), ("keep", "p p q p p")]
)
def test_duplicates(tmp_path, mode, expected):
    times = [("p", 1), ("q", 2), ("p", 1), ("p", 3), ("p", 4)]
    text = "user_id,item_id,timestamp\n" + "".join(f"u,{item},{time}\n" for item, time in times)
    text += "v,p,1\nv,q,2\nv,r,3\nv,s,4\n"
    manifest = run(tmp_path, text, duplicates=mode)
    split = "test" if len(expected.split()) > 2 else "train"
    assert named(tmp_path / "out", manifest, split)["u"] == expected.split()
    assert manifest.report.duplicates_dropped == 5 - len(expected.split())


def test_k_core_needs_several_rounds():
    # A stable block, and a chain that falls from its loose end, one link a round.
    block = [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")]
    chain = [("c", "x"), ("c", "z"), ("d", "w"), ("d", "z"), ("e", "w")]
    left, rounds = core_of(block + chain, 2, 2)
    assert left == set(block)
    # 1: e. 2: w (only d is left of it). 3: d. 4: z. 5: c.
    assert [(r.users_removed, r.items_removed, r.interactions_left) for r in rounds] == [
        (1, 0, 8),
        (0, 1, 7),
        (1, 0, 6),
        (0, 1, 5),
        (1, 0, 4),
    ]


def test_k_core_removes_users_and_items_of_one_round_together():
    block = [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")]
    left, rounds = core_of([*block, ("c", "z")], 2, 2)
    assert left == set(block)
    assert rounds == (CoreRound(users_removed=1, items_removed=1, interactions_left=4),)


def test_empty_after_k_core_says_when_and_what_to_change(tmp_path):
    with pytest.raises(
        DataError,
        match=r"after round 1 of the k-core.*10 interactions of 3 users with 4 items.*Lower "
        r"--user-core or --item-core",
    ):
        run(tmp_path, SMALL, user_core=5, item_core=5)
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["raw.csv"]  # no partial folder stays


def test_two_runs_give_the_same_bytes_everywhere(tmp_path):
    text = "user_id,item_id,timestamp\n" + "".join(
        f"u{i % 97},i{i * i % 31},{i * 7919 % 400}\n" for i in range(5000)
    )
    config = PrepareConfig(sequences_per_block=8, sequences_per_shard=20)
    contents = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        source = put(tmp_path / name / "raw.csv", text)
        manifest = prepare(source, tmp_path / name / "out", config, log=lambda _: None)
        contents.append(
            {path.name: path.read_bytes() for path in (tmp_path / name / "out").iterdir()}
        )
    assert contents[0] == contents[1]
    assert len(manifest.splits["train"].shards) == 5
    assert str(tmp_path).encode() not in b"".join(contents[0].values())
    assert manifest.source.file == "raw.csv"
    assert manifest.source.sha256 == hashlib.sha256(text.encode()).hexdigest()


def test_same_output_is_verified_and_reused_and_damage_is_found(tmp_path):
    lines: list[str] = []
    source = put(tmp_path / "raw.csv", SMALL)
    first = prepare(source, tmp_path / "out", PrepareConfig(**ALL), log=lines.append)
    assert any("Written" in line for line in lines)
    assert any(line.startswith("order by time") and "2 ties" in line for line in lines)
    lines.clear()
    assert prepare(source, tmp_path / "out", PrepareConfig(**ALL), log=lines.append) == first
    assert len(lines) == 1
    assert "verified and reused" in lines[0]
    shard = tmp_path / "out" / "test-000000.tar"
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"test-000000\.tar is damaged"):
        prepare(source, tmp_path / "out", PrepareConfig(**ALL), log=lines.append)


def test_other_outputs_are_refused(tmp_path):
    run(tmp_path, SMALL)
    with pytest.raises(DataError, match="--user-core was 1, now 2"):
        run(tmp_path, SMALL, user_core=2)
    with pytest.raises(DataError, match="sha256 was"):
        run(tmp_path, SMALL + "cat,w,9\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="something other than prepared data"):
        run(tmp_path, SMALL, name="full")
    with pytest.raises(DataError, match="something other than prepared data"):
        run(tmp_path, SMALL, name="raw.csv")
    (tmp_path / "empty").mkdir()
    assert run(tmp_path, SMALL, name="empty/deeper").num_users == 3
    (tmp_path / "empty2").mkdir()
    assert run(tmp_path, SMALL, name="empty2").num_users == 3


def test_sequence_text_keeps_repeats_and_refuses_global_temporal(tmp_path):
    source = put(tmp_path / "s.txt", "u1 a b a a\nu2 b a c b\n")
    with pytest.raises(DataError, match=r"has no time.*leave_one_out"):
        prepare(
            source,
            tmp_path / "out",
            PrepareConfig(split="global_temporal", **ALL),
            log=lambda _: None,
        )
    manifest = prepare(source, tmp_path / "out", PrepareConfig(**ALL), log=lambda _: None)
    assert named(tmp_path / "out", manifest, "test") == {
        "u1": ["a", "b", "a", "a"],
        "u2": ["b", "a", "c", "b"],
    }
    assert (manifest.report.duplicates_dropped, manifest.report.ties) == (0, 0)
    assert manifest.prepare.format == "sequences"


def test_titles_and_named_set(tmp_path):
    folder = tmp_path / "packages" / "recbole" / "dataset_example" / "ml-100k"
    folder.mkdir(parents=True)
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    body = "".join(f"{u}\t{i}\t3\t{t}\n" for u in (1, 2) for t, i in enumerate((5, 6, 7, 5)))
    (folder / "ml-100k.inter").write_text(header + body)
    (folder / "ml-100k.item").write_text(
        'item_id:token\tmovie_title:token_seq\trelease_year:token\n5\t"Five\t1995\n7\tSeven\t1995\n9\tNine\t0\n'
    )
    config = PrepareConfig(**ALL)
    manifest = prepare(
        "ml-100k", tmp_path / "out", config, packages_dir=tmp_path / "packages", log=lambda _: None
    )
    table = pq.read_table(tmp_path / "out" / "items.parquet").to_pydict()
    assert dict(zip(table["item_id"], table["title"])) == {"5": '"Five', "6": None, "7": "Seven"}
    assert manifest.report.items_with_title == 2
    assert (manifest.source.file, manifest.source.titles_file) == ("ml-100k.inter", "ml-100k.item")
    assert str(manifest.prepare.titles) == "ml-100k.item"
    own = put(tmp_path / "names.csv", "item_id,title\n6,Six\n")
    manifest = prepare(
        "ml-100k",
        tmp_path / "own",
        PrepareConfig(titles=Path(own), **ALL),
        packages_dir=tmp_path / "packages",
        log=lambda _: None,
    )
    assert pq.read_table(tmp_path / "own" / "items.parquet")["title"].to_pylist().count("Six") == 1
