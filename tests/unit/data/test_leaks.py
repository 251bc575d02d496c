"""Written training shards are read back: what the plan allows and what the files hold are two
things.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mltfr_dist.config import PrepareConfig
from mltfr_dist.data.prepare import leaks, pipeline, write
from mltfr_dist.data.prepare.run import prepare
from mltfr_dist.data.prepare.workspace import Workspace
from mltfr_dist.data.shards.manifest import SplitInfo
from mltfr_dist.data.shards.packed import PackedSequences
from mltfr_dist.data.shards.reader import read_shard
from mltfr_dist.data.shards.writer import SplitWriter
from mltfr_dist.errors import DataError

SIZES = {"sequences_per_block": 8, "sequences_per_shard": 40}
SPLITS = ("leave_one_out", "global_temporal")


def run(folder: Path, split: str) -> list[str]:
    """Prepare 3,000 interactions of 100 users; returns what was logged."""
    random = np.random.default_rng(0)
    rows = zip(
        random.integers(0, 100, 3000),
        random.integers(0, 50, 3000),
        random.integers(1.6e9, 1.7e9, 3000),
    )
    source = folder / "raw.csv"
    source.write_text(
        "user_id,item_id,timestamp\n" + "".join(f"u{u:02},i{i},{t}\n" for u, i, t in rows)
    )
    lines: list[str] = []
    config = PrepareConfig(user_core=1, item_core=1, split=split, **SIZES)  # type: ignore[arg-type]
    prepare(str(source), folder / "out", config, log=lines.append)
    return lines


def rewrite(monkeypatch: pytest.MonkeyPatch, change: Callable[[PackedSequences], None]) -> None:
    """Let the training shards be written as usual and then again, whole and in order, with
    ``change`` made to the second.
    """
    real = write.write_splits

    def tampering(
        connection, workspace: Workspace, config, *, num_items: int, num_users: int
    ) -> dict[str, SplitInfo]:
        written = real(connection, workspace, config, num_items=num_items, num_users=num_users)
        writer = SplitWriter(
            workspace.out, "train", num_items=num_items, num_users=num_users, **SIZES
        )
        for number, info in enumerate(written["train"].shards):
            packed = read_shard(workspace.out, info, num_items=num_items)
            packed = PackedSequences(packed.items.copy(), packed.offsets, packed.users.copy())
            if number == 1:
                change(packed)
            writer.add(packed)
        return written | {"train": writer.finish()}

    monkeypatch.setattr(write, "write_splits", tampering)


@pytest.mark.parametrize("split", SPLITS)
def test_shards_are_read_back_in_runs_of_any_size(tmp_path, monkeypatch, split):
    assert any(line.startswith("read back") and "no leak" in line for line in run(tmp_path, split))
    monkeypatch.setattr(leaks, "ROWS_PER_RUN", 40)
    (tmp_path / "out").rename(tmp_path / "before")
    run(tmp_path, split)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "before").iterdir()
    }


@pytest.mark.parametrize("split", SPLITS)
def test_one_interaction_too_many_is_found(tmp_path, monkeypatch, split):
    """The split is proved free of leaks; what is written from it afterwards is not."""
    real = pipeline.make_id_maps

    def tampering(connection):
        real(connection)
        connection.execute("UPDATE user_map SET train_end = train_end + 1 WHERE user_index = 50")

    monkeypatch.setattr(pipeline, "make_id_maps", tampering)
    with pytest.raises(
        DataError,
        match=r"train-000001\.tar: .* user 50 .* holds \d+ items, of which 1 lie at or after the "
        r"cut",
    ):
        run(tmp_path, split)
    assert [path.name for path in tmp_path.iterdir()] == ["raw.csv"]


@pytest.mark.parametrize("split", SPLITS)
def test_the_target_in_place_of_an_item_is_found(tmp_path, monkeypatch, split):
    def change(packed: PackedSequences) -> None:
        place = packed.offsets[4] - 1
        packed.items[place] = packed.items[place] % 50 + 1

    rewrite(monkeypatch, change)
    with pytest.raises(
        DataError,
        match=r"train-000001\.tar: .* user 43 .* holds item \d+ at position \d+, where its history "
        r"has",
    ):
        run(tmp_path, split)


def test_a_sequence_of_another_user_is_found(tmp_path, monkeypatch):
    def change(packed: PackedSequences) -> None:
        packed.users[2:4] = packed.users[[3, 2]]

    rewrite(monkeypatch, change)
    with pytest.raises(DataError, match=r"train-000001\.tar: .* holds "):
        run(tmp_path, "leave_one_out")


def test_what_the_disk_did_not_keep_is_found(tmp_path, monkeypatch):
    real = write.write_splits

    def damaging(connection, workspace: Workspace, *arguments, **more):
        written = real(connection, workspace, *arguments, **more)
        path = workspace.out / "train-000002.tar"
        content = bytearray(path.read_bytes())
        content[700] ^= 1
        path.write_bytes(content)
        return written

    monkeypatch.setattr(write, "write_splits", damaging)
    with pytest.raises(DataError, match=r"train-000002\.tar is damaged"):
        run(tmp_path, "leave_one_out")
