"""Damage to prepared data: whatever happens to a shard, no sample of it is wrong or missing without
an error.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import REPOSITORY, run_ranks, tiny_config, write_data

from mltfr_dist.config import DataConfig
from mltfr_dist.data.shards.manifest import Manifest, load_manifest, read_manifest, verify_folder
from mltfr_dist.data.shards.quarantine import find_bad_shards, loss_report
from mltfr_dist.data.shards.reader import _from_npy, read_shard
from mltfr_dist.data.shards.retry import RetryPolicy, read_with_retries
from mltfr_dist.data.stream.training import BatchLayout, TrainStream
from mltfr_dist.errors import DataError
from mltfr_dist.files import file_sha256
from mltfr_dist.training.run_folder import dump_config

QUICK = RetryPolicy(1, 60.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("damage"))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def samples(folder: Path, **data: object) -> list[tuple[int, ...]]:
    """Every training sequence that a stream delivers."""
    config = DataConfig(path=folder, max_len=64, read_attempts=1, **data)
    result = []
    for step in TrainStream(folder, config, BatchLayout(0, 1, 8, 8), seed=0).epoch(0):
        for batch in step.micro_batches:
            for items, targets in zip(
                batch.item_ids.tolist(), batch.target_ids.tolist(), strict=True
            ):
                row = tuple(i for i in items if i)
                result += [(*row, targets[len(row) - 1])] if row else []
    return sorted(result)


# --- fuzz
# ------------------------------------------------------------


def check_damage(
    folder: Path, shard: int, kind: str, place: float, bit: int, *, hashes_agree: bool
) -> None:
    """Damage a shard and read everything: an error that names it, or, if nothing was changed, every
    sample.

    Args:
        folder: prepared data, put right again afterwards.
        shard: number of the training shard.
        kind: "cut", "cut at 512", "flip" or "overwrite".
        place: where, as a share of the file.
        bit: which bit or value.
        hashes_agree: the manifest's size and hash are those of the damaged file: only the content
            tells.
    """
    manifest = read_manifest(folder)
    info = manifest.splits["train"].shards[shard % len(manifest.splits["train"].shards)]
    path, whole = folder / info.file, (folder / info.file).read_bytes()
    intact = read_shard(folder, info, num_items=manifest.num_items)
    content = bytearray(whole)
    position = int(place * (len(whole) - 1))
    if kind.startswith("cut"):
        content = content[: position if kind == "cut" else position // 512 * 512]
    elif kind == "flip":
        content[position] ^= 1 << bit
    else:
        content[position : position + 8] = bytes([bit]) * len(content[position : position + 8])
    try:
        path.write_bytes(content)
        if hashes_agree:
            changed = info.model_copy(update={"bytes": len(content), "sha256": file_sha256(path)})
            result = None
            with contextlib.suppress(DataError):
                result = read_shard(folder, changed, num_items=manifest.num_items)
            if result is None:
                return
            # What agrees in counts, bounds and keys can differ in values alone; sequences are never
            # lost or gained.
            assert len(result) == len(intact)
            assert len(result.items) == len(intact.items)
        elif content == whole:
            assert len(samples(folder)) == manifest.splits["train"].num_sequences
        else:
            with pytest.raises(DataError, match=info.file.replace(".", r"\.")) as caught:
                samples(folder)
            assert "mltfr prepare" in caught.value.remedy
    finally:
        path.write_bytes(whole)


DAMAGE = {
    "shard": st.integers(0, 3),
    "kind": st.sampled_from(["cut", "cut at 512", "flip", "overwrite"]),
    "place": st.floats(0, 1),
    "bit": st.integers(0, 7),
    "hashes_agree": st.booleans(),
}
FUZZ = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


@settings(max_examples=60, **FUZZ)
@given(**DAMAGE)
def test_no_cut_and_no_flip_goes_unnoticed(folder: Path, **damage: object) -> None:
    check_damage(folder, **damage)


@pytest.mark.slow
@settings(max_examples=500, **FUZZ)
@given(**DAMAGE)
def test_no_cut_and_no_flip_goes_unnoticed_500_times(folder: Path, **damage: object) -> None:
    check_damage(folder, **damage)


def test_a_cut_at_any_tar_block_is_found_by_its_content_alone(folder: Path) -> None:
    """Even where somebody wrote the cut file's size and hash into the manifest."""
    manifest = read_manifest(folder)
    info = manifest.splits["train"].shards[0]
    path, whole = folder / info.file, (folder / info.file).read_bytes()
    end = len(whole.rstrip(b"\0"))
    try:
        for size in range(0, end, 512):
            path.write_bytes(whole[:size])
            changed = info.model_copy(update={"bytes": size, "sha256": file_sha256(path)})
            with pytest.raises(DataError, match="damaged"):
                read_shard(folder, changed, num_items=manifest.num_items)
    finally:
        path.write_bytes(whole)


# --- what a manifest may not say
# ----------------------------------------------------------------------------------


def changed_manifest(copy: Path, **shard: object) -> None:
    values = json.loads((copy / "manifest.json").read_text())
    values["splits"]["train"]["shards"][1] |= shard
    (copy / "manifest.json").write_text(json.dumps(values))


def test_manifests_that_cannot_be_are_refused(copy: Path) -> None:
    text = (copy / "manifest.json").read_text()
    shards = json.loads(text)["splits"]["train"]["shards"]
    for change, words in [
        ({"num_sequences": 0}, "greater than or equal to 1"),
        (
            {"num_sequences": shards[1]["num_sequences"] - 1},
            "num_sequences is 120, but its shards have 119",
        ),
        ({"sha256": shards[0]["sha256"]}, "two shards have the same sha256"),
        ({"file": shards[0]["file"]}, "two shards have the same file, train-000000.tar"),
        ({"file": "pipe:id"}, "pattern"),
    ]:
        changed_manifest(copy, **change)
        with pytest.raises(DataError, match=words):
            load_manifest(copy)
        (copy / "manifest.json").write_text(text)


def test_a_missing_and_an_empty_shard_are_named(copy: Path) -> None:
    (copy / "train-000002.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"train-000002\.tar is damaged: it has 0 bytes"):
        samples(copy)
    (copy / "train-000002.tar").unlink()
    with pytest.raises(DataError, match=r"train-000002\.tar is missing"):
        samples(copy)


# --- quarantine
# ------------------------------------------------------------------------------------------------


def damaged_copy(copy: Path) -> tuple[Manifest, dict[str, str]]:
    flip(copy / "train-000001.tar", 2000)
    (copy / "test-000000.tar").unlink()
    manifest = read_manifest(copy)
    return manifest, find_bad_shards(copy, manifest, QUICK)


def test_bad_shards_are_found_and_their_loss_is_exact(copy: Path) -> None:
    manifest, bad = damaged_copy(copy)
    assert list(bad) == ["train-000001.tar", "test-000000.tar"]
    assert "sha256" in bad["train-000001.tar"]
    assert "missing" in bad["test-000000.tar"]
    train, test = manifest.splits["train"], manifest.splits["test"]
    text = loss_report(copy, manifest, bad)
    assert (
        f"train loses 32 of 120 sequences (26.67%) and {train.shards[1].num_items:,} of "
        f"{train.num_items:,} items" in text
    )
    assert (
        f"test loses 32 of 120 sequences (26.67%) and {test.shards[0].num_items:,} of "
        f"{test.num_items:,} items" in text
    )
    assert "valid" not in text
    with pytest.raises(DataError, match="No shard of split train"):
        loss_report(copy, manifest, {shard.file: "gone" for shard in train.shards})


def test_what_is_left_out_is_as_if_it_had_never_been(copy: Path, folder: Path) -> None:
    manifest, bad = damaged_copy(copy)
    lost = read_shard(folder, manifest.splits["train"].shards[1], num_items=manifest.num_items)
    expected = samples(folder)
    for index in range(len(lost)):
        expected.remove(tuple(lost[index].tolist()))
    assert samples(copy, left_out=tuple(bad)) == expected
    assert verify_folder(copy, left_out=tuple(bad)).splits["train"].num_sequences == 88
    with pytest.raises(DataError, match=r"no shard train-000009\.tar"):
        load_manifest(copy, left_out=("train-000009.tar",))


@pytest.mark.integration
@pytest.mark.parametrize("on_bad_shard", ["stop", "quarantine"])
def test_both_ranks_of_a_run_do_the_same(tmp_path: Path, on_bad_shard: str) -> None:
    """Two real ranks: one of them stops both, or both leave out the same and the run records
    what.
    """
    config = tiny_config(
        tmp_path, mltfr__enabled=False, training__epochs=1, data__on_bad_shard=on_bad_shard
    )
    flip(tmp_path / "data" / "train-000001.tar", 2000)
    (tmp_path / "run.yaml").write_text(dump_config(config))
    command = (REPOSITORY / "train.py", "--config", str(tmp_path / "run.yaml"))
    if on_bad_shard == "stop":
        with pytest.raises(AssertionError) as failure:
            run_ranks(2, *command)
        # Said by one rank, at once and where torchrun ends.
        assert str(failure.value).count("train-000001.tar is damaged: its sha256 begins") == 2
        return
    for _ in range(2):  # the second time the run is finished, and the same run
        output = run_ranks(2, *command)
        assert output.count("Left out on all ranks: train-000001.tar") == 1
        assert "train loses 32 of 120 sequences (26.67%)" in output
    assert "left_out:\n  - train-000001.tar" in (config.folder / "config.yaml").read_text()
    result = json.loads((config.folder / "result.json").read_text())
    assert result["world_size"] == 2


# --- slow and failing readers
# -------------------------------------------------------------------------------------


def test_a_failing_read_is_repeated_with_growing_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "shard"
    path.write_bytes(b"content")
    pauses: list[float] = []
    real = Path.read_bytes

    def flaky(self: Path) -> bytes:
        if len(pauses) < 3:
            raise OSError(5, "Input/output error")
        return real(self)

    monkeypatch.setattr(Path, "read_bytes", flaky)
    monkeypatch.setattr(time, "sleep", pauses.append)
    assert read_with_retries(path, RetryPolicy(4, 10.0)) == b"content"
    assert pauses == [0.5, 1.0, 2.0]
    pauses.clear()
    with pytest.raises(
        DataError, match="could not be read in 3 attempts: Input/output error"
    ) as caught:
        read_with_retries(path, RetryPolicy(3, 10.0))
    assert "read_attempts" in caught.value.remedy


def test_a_reader_that_hangs_is_given_up(tmp_path: Path) -> None:
    """A named pipe without a writer never answers."""
    os.mkfifo(tmp_path / "hangs")
    started = time.monotonic()
    with pytest.raises(
        DataError, match=r"could not be read in 2 attempts: no answer within 0\.1 s"
    ):
        read_with_retries(tmp_path / "hangs", RetryPolicy(2, 0.1))
    assert time.monotonic() - started < 10
    os.close(os.open(tmp_path / "hangs", os.O_WRONLY | os.O_NONBLOCK))  # let the readers go


# --- safety
# ------------------------------------------------------------


def test_a_huge_size_in_a_header_takes_no_memory() -> None:
    honest = npy_bytes(np.zeros(3, np.uint8))
    claims = honest.replace(b"(3,), }" + b" " * 12, b"(9999999999999,), }")
    assert len(claims) == len(honest)
    assert claims != honest
    with pytest.raises(ValueError, match="claims 9,999,999,999,999 bytes"):
        _from_npy(claims)


def npy_bytes(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
