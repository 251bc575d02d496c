"""Streams over really prepared shards: exact epochs, any division, any resume."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mltfr_dist.config import DataConfig, PrepareConfig
from mltfr_dist.data.batch import PADDING_IDX, RankingBatch, SequenceBatch
from mltfr_dist.data.prepare.run import prepare
from mltfr_dist.data.shards.manifest import load_manifest
from mltfr_dist.data.shards.packed import PackedSequences
from mltfr_dist.data.shards.reader import read_blocks, read_shard
from mltfr_dist.data.stream.augment import ViewRatios
from mltfr_dist.data.stream.collate import Objective
from mltfr_dist.data.stream.order import EpochOrder
from mltfr_dist.data.stream.ranking import RankingStream
from mltfr_dist.data.stream.training import BatchLayout, StepBatches, TrainStream
from mltfr_dist.errors import ConfigError, DataError
from mltfr_dist.models.packing import Packing

NUM_USERS, PER_SHARD, WINDOW = 43, 6, 2
WHOLE = 64
"""A max_len that cuts nothing."""
Row = tuple[int, tuple[int, ...], tuple[int, ...]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """43 training sequences in shards of 6 (so windows of 12, 12, 12 and 7), histories of 2 to 14
    items.
    """
    root = tmp_path_factory.mktemp("stream")
    random = np.random.default_rng(0)
    lines = [
        f"u{u} " + " ".join(f"i{i}" for i in random.integers(0, 60, size=4 + u % 13))
        for u in range(NUM_USERS)
    ]
    (root / "raw.txt").write_text("\n".join(lines) + "\n")
    config = PrepareConfig(
        format="sequences",
        user_core=1,
        item_core=1,
        duplicates="keep",
        sequences_per_block=4,
        sequences_per_shard=PER_SHARD,
    )
    manifest = prepare(str(root / "raw.txt"), root / "data", config, log=lambda _: None)
    assert manifest.splits["train"].num_sequences == NUM_USERS
    assert len(manifest.splits["train"].shards) == 8
    return root / "data"


def stored(folder: Path, split: str) -> list[tuple[int, ...]]:
    """Every stored sequence of a split."""
    manifest = load_manifest(folder)
    shards = [
        read_shard(folder, info, num_items=manifest.num_items)
        for info in manifest.splits[split].shards
    ]
    packed = PackedSequences.concatenate(shards)
    return [tuple(map(int, packed[i])) for i in range(len(packed))]


def stream(
    folder: Path,
    size: int = 8,
    rank: int = 0,
    world: int = 1,
    micro: int | None = None,
    *,
    seed: int = 3,
    max_len: int = WHOLE,
    num_negatives: int = 0,
    window: int = WINDOW,
    objective: Objective | None = None,
    **data: object,
) -> TrainStream:
    block = BatchLayout(rank, world, size, micro or size // world)
    config = DataConfig(path=folder, max_len=max_len, shuffle_shards=window, **data)
    return TrainStream(
        folder,
        config,
        block,
        seed=seed,
        objective=Objective(num_negatives=num_negatives) if objective is None else objective,
    )


def rows(batch: SequenceBatch) -> list[Row]:
    """(sample id, history, targets) of each row that holds a sequence."""
    result = []
    for items, targets, sample in zip(
        batch.item_ids.tolist(), batch.target_ids.tolist(), batch.sample_ids.tolist(), strict=True
    ):
        if sample >= 0:
            result.append((sample, tuple(i for i in items if i), tuple(i for i in targets if i)))
        else:
            assert not any(items)
            assert not any(targets)
    return result


def all_rows(steps: list[StepBatches]) -> list[list[Row]]:
    return [[row for batch in step.micro_batches for row in rows(batch)] for step in steps]


def same(left: list[StepBatches], right: list[StepBatches]) -> bool:
    if [s.num_targets for s in left] != [s.num_targets for s in right]:
        return False
    pairs = zip(
        (b for s in left for b in s.micro_batches),
        (b for s in right for b in s.micro_batches),
        strict=True,
    )
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) else a == b
        for x, y in pairs
        for a, b in zip(x, y, strict=True)
    )


# --- exactness
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "world", "micro"),
    [(8, 1, 8), (8, 2, 2), (12, 4, 3), (5, 5, 1), (64, 4, 16), (1, 1, 1)],
)
def test_every_sequence_comes_exactly_once_an_epoch(
    folder: Path, size: int, world: int, micro: int
) -> None:
    for epoch in (0, 3):
        ranks = [
            list(stream(folder, size, rank, world, micro).epoch(epoch)) for rank in range(world)
        ]
        assert (
            {len(steps) for steps in ranks}
            == {stream(folder, size, 0, world, micro).steps_per_epoch}
            == {-(-NUM_USERS // size)}
        )
        everything = [row for steps in ranks for step in all_rows(steps) for row in step]
        assert sorted(history + targets[-1:] for _, history, targets in everything) == sorted(
            stored(folder, "train")
        )
        assert sorted(sample for sample, _, _ in everything) == list(range(NUM_USERS))


@pytest.mark.parametrize(
    ("world", "micro"), [(1, 4), (1, 1), (2, 4), (2, 2), (4, 2), (4, 1), (8, 1)]
)
def test_global_batches_are_equal_for_any_ranks_and_micro_batches(
    folder: Path, world: int, micro: int
) -> None:
    whole = list(stream(folder, num_negatives=2).epoch(1))
    ranks = [
        list(stream(folder, 8, rank, world, micro, num_negatives=2).epoch(1))
        for rank in range(world)
    ]
    negatives = lambda steps: [  # noqa: E731
        {
            int(s): b.negative_ids[i][b.target_ids[i] != 0].tolist()
            for b in step.micro_batches
            for i, s in enumerate(b.sample_ids)
        }
        for step in steps
    ]
    for number, step in enumerate(whole):
        assert sorted(r for steps in ranks for r in all_rows(steps)[number]) == sorted(
            all_rows(whole)[number]
        )
        assert {steps[number].num_targets for steps in ranks} == {step.num_targets}
        merged: dict[int, list[list[int]]] = {}
        for steps in ranks:
            merged |= negatives(steps)[number]
        assert merged | {-1: []} == negatives(whole)[number] | {-1: []}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_batches_have_their_shape_and_sample_ids_their_step(folder: Path, world: int) -> None:
    for rank in range(world):
        for number, step in enumerate(stream(folder, 8, rank, world, 2).epoch(0)):
            assert len(step.micro_batches) == 8 // (world * 2)
            for batch in step.micro_batches:
                assert batch.item_ids.shape == batch.target_ids.shape
                assert batch.item_ids.shape[0] == len(batch.sample_ids) == 2
                assert batch.negative_ids is None
                assert all(number * 8 <= sample < number * 8 + 8 for sample, _, _ in rows(batch))


def test_ranks_get_nearly_equal_work(folder: Path) -> None:
    for step in zip(*(stream(folder, 16, rank, 2).epoch(0) for rank in range(2)), strict=True):
        longest = [int((s.micro_batches[0].item_ids != PADDING_IDX).sum(1).max()) for s in step]
        assert abs(len(rows(step[0].micro_batches[0])) - len(rows(step[1].micro_batches[0]))) <= 1
        assert abs(longest[0] - longest[1]) <= 4


# --- order
# ------------------------------------------------------------


def test_the_order_depends_on_seed_and_epoch_alone(folder: Path) -> None:
    def order(epoch: int, **keys: Any) -> list[Any]:
        return [row for step in all_rows(list(stream(folder, **keys).epoch(epoch))) for row in step]

    assert order(2) == order(2)
    assert sorted(order(2, size=4)) == sorted(order(2)) == sorted(order(2, size=43))
    by_sample = {sample: history for sample, history, _ in order(2)}
    for change in (order(3), order(2, seed=4)):
        assert {sample: history for sample, history, _ in change} != by_sample
    used = stream(folder)
    list(used.epoch(0)), list(used.epoch(1))  # what went before leaves no trace
    assert same(list(used.epoch(2)), list(stream(folder).epoch(2)))


def test_windows_hold_every_shard_once_and_shuffle_shards_together(folder: Path) -> None:
    plain = stream(folder, 1)
    windows = plain.windows(0)
    assert sorted(i for window in windows for i in window) == list(range(8))
    assert [len(window) for window in windows] == [WINDOW] * 4
    assert plain.windows(1) != windows
    assert stream(folder, 4, 1, 2).windows(0) == windows
    shard_of = {sequence: i // PER_SHARD for i, sequence in enumerate(stored(folder, "train"))}
    in_order = [
        shard_of[history + targets[-1:]]
        for [(_, history, targets)] in all_rows(list(plain.epoch(0)))
    ]
    for window in windows:
        count = sum(plain.split.shards[i].num_sequences for i in window)
        block, in_order = in_order[:count], in_order[count:]
        assert set(block) == set(window)
        assert block not in (
            sorted(block),
            sorted(block, reverse=True),
        )  # mixed, not one shard after the other
    assert not in_order


# --- resume
# ------------------------------------------------------------


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    size=st.sampled_from([4, 6, 8, 12, 24]),
    share=st.floats(0, 1),
    epoch=st.integers(0, 3),
    world=st.sampled_from([1, 2]),
)
def test_resuming_at_any_step_equals_going_on(
    folder: Path, size: int, share: float, epoch: int, world: int
) -> None:
    rank = world - 1
    whole = list(stream(folder, size, rank, world, num_negatives=1).epoch(epoch))
    start = round(share * len(whole))
    resumed = list(stream(folder, size, rank, world, num_negatives=1).epoch(epoch, start))
    assert len(resumed) == len(whole) - start
    assert same(resumed, whole[start:])


@pytest.mark.parametrize("size", [4, 6, 12])
def test_resuming_at_window_boundaries(folder: Path, size: int) -> None:
    """Windows end after 12, 24 and 36 sequences or, where the last shard (of 1) comes earlier, 5
    before.
    """
    whole = list(stream(folder, size).epoch(0))
    for start in range(len(whole) + 1):
        assert same(list(stream(folder, size).epoch(0, start)), whole[start:])


def test_resuming_reads_no_shard_that_is_not_needed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mltfr_dist.data.stream import training as module

    read: list[str] = []
    monkeypatch.setattr(
        module,
        "read_blocks",
        lambda f, info, **keys: (read.append(info.file), read_blocks(f, info, **keys))[1],
    )
    resumed = stream(folder, 6)
    list(resumed.epoch(0, 6))  # from sequence 36 of 43
    last = {resumed.split.shards[i].file for i in (resumed.windows(0)[2] + resumed.windows(0)[3])}
    assert set(read) <= last
    assert len(read) <= 3


# --- content
# ------------------------------------------------------------


def test_targets_are_the_next_items_and_the_last_item_is_only_a_target(folder: Path) -> None:
    for step in stream(folder).epoch(0):
        for batch in step.micro_batches:
            items, targets = batch.item_ids, batch.target_ids
            assert torch.equal(targets[:, :-1] * (items[:, 1:] != 0), items[:, 1:])
            assert torch.equal(items != 0, targets != 0)  # nothing is read that predicts nothing
            lengths = (items != 0).sum(1)
            assert all(
                (row[:n] != 0).all() for row, n in zip(items, lengths, strict=True)
            )  # starts at 0, no gaps
        assert step.num_targets == sum(batch.num_targets for batch in step.micro_batches)


@pytest.mark.parametrize("max_len", [1, 3, 5])
def test_a_history_is_cut_to_its_most_recent_items(folder: Path, max_len: int) -> None:
    expected = sorted((s[:-1][-max_len:], s[1:][-max_len:]) for s in stored(folder, "train"))
    steps = list(stream(folder, max_len=max_len).epoch(0))
    assert (
        sorted((history, targets) for step in all_rows(steps) for _, history, targets in step)
        == expected
    )
    assert max(batch.item_ids.shape[1] for step in steps for batch in step.micro_batches) == max_len
    assert [s.num_targets for s in steps] == [
        sum(b.num_targets for b in s.micro_batches) for s in steps
    ]


def test_negatives_avoid_the_full_history_even_where_it_is_cut(folder: Path) -> None:
    whole = {
        sample: set(history + targets)
        for step in all_rows(list(stream(folder).epoch(0)))
        for sample, history, targets in step
    }
    for step in stream(folder, max_len=2, num_negatives=40).epoch(0):
        for batch in step.micro_batches:
            assert batch.negative_ids is not None
            assert batch.negative_ids.shape == (*batch.item_ids.shape, 40)
            for sample, negatives in zip(
                batch.sample_ids.tolist(), batch.negative_ids, strict=True
            ):
                if sample >= 0:
                    assert not whole[sample] & set(negatives.flatten().tolist())


def test_the_last_batch_is_filled_with_empty_rows(folder: Path) -> None:
    last = [list(stream(folder, 8, rank, 4, 2).epoch(0))[-1] for rank in range(4)]  # 43 = 5 * 8 + 3
    batches = [step.micro_batches[0] for step in last]
    assert [int((b.sample_ids >= 0).sum()) for b in batches] == [1, 1, 1, 0]
    assert batches[3].item_ids.shape == (2, 1)
    assert batches[3].num_targets == 0
    assert {step.num_targets for step in last} == {sum(b.num_targets for b in batches)}


def test_ranks_get_the_next_shorter_sequence_there_and_back(folder: Path) -> None:
    """In one direction the first rank would have the longer of each two."""
    for steps in zip(*(stream(folder, 8, rank, 2).epoch(0) for rank in range(2)), strict=True):
        first, second = ([len(row[1]) for row in rows(s.micro_batches[0])] for s in steps)
        by_length = sorted([*first, *second], reverse=True)
        assert first == [n for i, n in enumerate(by_length) if i % 4 in (0, 3)]
        assert second == [n for i, n in enumerate(by_length) if i % 4 in (1, 2)]


@pytest.mark.parametrize(("size", "world", "micro"), [(8, 3, 1), (8, 2, 3), (8, 4, 4)])
def test_a_batch_that_cannot_be_divided_is_an_error(size: int, world: int, micro: int) -> None:
    with pytest.raises(
        ConfigError, match=f"training.global_batch_size {size} cannot be dealt out to {world} ranks"
    ) as caught:
        BatchLayout(0, world, size, micro)
    assert "multiple of world_size x micro_batch_size" in caught.value.rule
    assert "training.micro_batch_size" in caught.value.remedy


def test_more_ranks_than_sequences_is_an_error(folder: Path) -> None:
    with pytest.raises(ConfigError, match="64 ranks and 43 training sequences") as caught:
        stream(folder, 64, 0, 64)
    assert "fewer ranks" in caught.value.remedy


# --- ranking
# ------------------------------------------------------------


def ranked(batch: RankingBatch) -> list[tuple[tuple[int, ...], int, tuple[int, ...]]]:
    """(history, target, seen items) of each real row."""
    result = []
    for row, (items, target) in enumerate(
        zip(batch.item_ids.tolist(), batch.target_ids.tolist(), strict=True)
    ):
        if target != PADDING_IDX:
            result.append(
                (
                    tuple(i for i in items if i),
                    target,
                    tuple(batch.seen_items[batch.seen_rows == row].tolist()),
                )
            )
    return result


@pytest.mark.parametrize("split", ["valid", "test"])
@pytest.mark.parametrize("batch_size", [5, 7, 100])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranking_holds_each_user_once_and_the_same_batches_at_any_world_size(
    folder: Path, split: str, batch_size: int, world: int
) -> None:
    alone = list(RankingStream(folder, split, max_len=WHOLE, batch_size=batch_size))
    ranks = [
        list(
            RankingStream(
                folder, split, max_len=WHOLE, batch_size=batch_size, rank=r, world_size=world
            )
        )
        for r in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1  # the same number of collectives
    for number, batch in enumerate(alone):
        mine = ranks[number // len(ranks[0])][number % len(ranks[0])]
        assert batch.target_rows is batch.seen_targets is mine.target_rows is None  # one a user
        assert all(torch.equal(a, b) for a, b in zip(batch[:5], mine[:5], strict=True))
    users = [user for batches in ranks for batch in batches for user in ranked(batch)]
    assert sorted(users) == sorted((s[:-1], s[-1], s[:-1]) for s in stored(folder, split))
    assert all(len(batch.target_ids) == batch_size for batch in alone[:-1])


@pytest.mark.parametrize("max_len", [1, 4])
def test_ranking_cuts_the_history_but_not_what_was_seen(folder: Path, max_len: int) -> None:
    batches = RankingStream(folder, "test", max_len=max_len, batch_size=10)
    users = [user for batch in batches for user in ranked(batch)]
    assert users == [(s[:-1][-max_len:], s[-1], s[:-1]) for s in stored(folder, "test")]
    assert batches.num_users == len(users) == NUM_USERS


# --- what the objective asks for
# ---------------------------------------------------------------------------------

RATIOS = ViewRatios(0.5, 0.5, 0.5)


def by_sample(steps: list[StepBatches]) -> dict[int, dict[str, list[int]]]:
    """What each sequence is given, without padding."""
    result = {}
    for batch in (b for step in steps for b in step.micro_batches):
        for i, sample in enumerate(batch.sample_ids.tolist()):
            if sample < 0:
                continue
            n = int((batch.item_ids[i] != 0).sum())
            row = {
                "items": batch.item_ids[i, :n].tolist(),
                "targets": batch.target_ids[i, :n].tolist(),
            }
            if batch.view_ids is not None:
                row |= {f"view {v}": batch.view_ids[i, v, :n].tolist() for v in range(2)}
            result[sample] = row
    return result


@pytest.mark.parametrize("max_len", [3, WHOLE])
def test_cloze_hides_what_it_asks_for_and_counts_it(folder: Path, max_len: int) -> None:
    mask = load_manifest(folder).num_items + 1
    steps = list(stream(folder, max_len=max_len, objective=Objective(cloze_ratio=0.3)).epoch(0))
    originals = []
    for step in steps:
        for batch in step.micro_batches:
            masked = batch.target_ids != PADDING_IDX
            assert torch.equal(
                batch.item_ids == mask, masked
            )  # the target itself is nowhere to be seen
            assert masked.any(1)[batch.sample_ids >= 0].all()
            for items, targets in zip(
                batch.item_ids.tolist(), batch.target_ids.tolist(), strict=True
            ):
                originals.append(tuple(t or i for i, t in zip(items, targets, strict=True) if i))
        assert step.num_targets == sum(batch.num_targets for batch in step.micro_batches)
        assert step.num_positions == sum(
            int((batch.item_ids != 0).sum()) for batch in step.micro_batches
        )
    cut = sorted(
        s[-max_len - 1 :] for s in stored(folder, "train")
    )  # the last item too, and a place more for it
    assert sorted(o for o in originals if o) == cut
    positions, targets = (
        sum(getattr(step, name) for step in steps) for name in ("num_positions", "num_targets")
    )
    assert 0.2 < targets / positions < 0.5
    assert by_sample(
        list(stream(folder, objective=Objective(cloze_ratio=0.3)).epoch(1))
    ) != by_sample(steps)


@pytest.mark.parametrize(("world", "micro"), [(1, 4), (2, 4), (2, 2), (4, 2)])
@pytest.mark.parametrize(
    "objective",
    [
        Objective(cloze_ratio=0.3, num_shared_negatives=5, proposal="log_uniform"),
        Objective(views=RATIOS, group_size=2, num_shared_negatives=5),
    ],
    ids=["cloze", "views"],
)
def test_masks_views_and_shared_negatives_do_not_depend_on_the_division(
    folder: Path, world: int, micro: int, objective: Objective
) -> None:
    whole = list(stream(folder, objective=objective).epoch(1))
    ranks = [
        list(stream(folder, 8, rank, world, micro, objective=objective).epoch(1))
        for rank in range(world)
    ]
    for number, step in enumerate(whole):
        blocks = [steps[number] for steps in ranks]
        assert by_sample(blocks) == by_sample([step])
        assert {p[1:] for p in blocks} == {step[1:]}  # all three counts
        for batch in (b for block in blocks for b in block.micro_batches):
            assert torch.equal(batch.shared_negative_ids, step.micro_batches[0].shared_negative_ids)
            assert torch.equal(
                batch.shared_log_probability, step.micro_batches[0].shared_log_probability
            )
    assert not torch.equal(
        whole[0].micro_batches[0].shared_negative_ids, whole[1].micro_batches[0].shared_negative_ids
    )
    resumed = list(stream(folder, objective=objective).epoch(1, 2))
    assert same(resumed, whole[2:])


@pytest.mark.parametrize(("world", "micro"), [(1, 8), (2, 4), (1, 4)])
def test_groups_stay_together(folder: Path, world: int, micro: int) -> None:
    def groups(world: int, micro: int) -> list[set[tuple[int, ...]]]:
        objective = Objective(views=RATIOS, group_size=4)
        result: list[set[tuple[int, ...]]] = []
        for steps in zip(
            *(
                stream(folder, 8, r, world, micro, objective=objective).epoch(0)
                for r in range(world)
            ),
            strict=True,
        ):
            ids = [
                i for s in steps for b in s.micro_batches for i in b.sample_ids.view(-1, 4).tolist()
            ]
            result.append({tuple(i for i in group if i >= 0) for group in ids} - {()})
        return result

    assert groups(world, micro) == groups(1, 8)
    assert {len(group) for step in groups(1, 8) for group in step} == {3, 4}  # 43 sequences


def test_a_group_that_does_not_fit_a_micro_batch_is_an_error(folder: Path) -> None:
    with pytest.raises(
        ConfigError, match="contrast_group is 3, but a micro-batch holds 4"
    ) as caught:
        stream(folder, 8, 0, 2, 4, objective=Objective(views=RATIOS, group_size=3))
    assert "one micro-batch" in caught.value.rule
    assert "backbone.cl4srec.contrast_group" in caught.value.remedy


# --- loader workers
# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("workers", [1, 3])
def test_batches_are_equal_with_any_number_of_loader_workers(
    folder: Path, world: int, workers: int
) -> None:
    for rank in range(world):
        keys = {"num_negatives": 2, "length_pool": 2}
        alone = list(stream(folder, 8, rank, world, 2, **keys).epoch(1, 1))
        assert same(
            list(stream(folder, 8, rank, world, 2, num_workers=workers, **keys).epoch(1, 1)), alone
        )


def test_any_step_can_be_made_by_itself(folder: Path) -> None:
    used = stream(folder, 8, length_pool=2)
    whole = list(used.epoch(1))
    for number in (5, 0, 3, 2, 4, 1):
        assert same([used.step(1, number)], [whole[number]])
        assert same([stream(folder, 8, length_pool=2).step(1, number)], [whole[number]])


def test_a_killed_worker_ends_the_epoch_with_a_message(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = TrainStream.step

    def killed(self: TrainStream, epoch: int, step: int) -> StepBatches:
        if step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return made(self, epoch, step)

    monkeypatch.setattr(TrainStream, "step", killed)  # forked workers inherit it
    with pytest.raises(DataError, match="A loader worker has died") as caught:
        list(stream(folder, 4, num_workers=2).epoch(0))
    assert "out-of-memory" in caught.value.remedy


def test_damage_met_by_a_worker_is_the_same_error(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shard = copy / "train-000003.tar"
    content = bytearray(shard.read_bytes())
    content[700] ^= 1
    shard.write_bytes(content)
    for workers in (0, 2):
        with pytest.raises(DataError, match=r"train-000003\.tar is damaged: its sha256") as caught:
            list(stream(copy, 4, num_workers=workers).epoch(0))
        assert "prepare" in caught.value.remedy


# --- last batch, long histories, length
# ---------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "pool"), [(1, 1), (2, 1), (2, 3)])
def test_the_last_batch_can_be_left_out(folder: Path, world: int, pool: int) -> None:
    keys = {"last_batch": "drop", "length_pool": pool}
    ranks = [stream(folder, 8, rank, world, 2, **keys) for rank in range(world)]
    assert {s.steps_per_epoch for s in ranks} == {5}
    steps = [list(s.epoch(0)) for s in ranks]
    ids = [row[0] for rank in steps for step in all_rows(rank) for row in step]
    assert sorted(ids) == list(range(40))  # 43 sequences, 5 batches of 8
    assert all(step.num_sequences == 8 for rank in steps for step in rank)
    with pytest.raises(ConfigError, match="no whole batch of 64") as caught:
        stream(folder, 64, last_batch="drop")
    assert "last_batch=pad" in caught.value.remedy


@pytest.mark.parametrize("max_len", [1, 3, 4, WHOLE])
@pytest.mark.parametrize("pool", [1, 2])
def test_windows_hold_every_item_of_long_histories_once_as_a_target(
    folder: Path, max_len: int, pool: int
) -> None:
    keys = {
        "max_len": max_len,
        "long_histories": "windows",
        "num_negatives": 9,
        "length_pool": pool,
    }
    ranks = [stream(folder, 8, rank, 2, 2, **keys) for rank in range(2)]
    expected = []
    for items in stored(folder, "train"):
        ends = range(len(items), 1, -max_len)
        expected += [
            (items[max(0, end - 1 - max_len) : end - 1], items[max(0, end - 1 - max_len) + 1 : end])
            for end in ends
        ]
    result = [row[1:] for s in ranks for step in all_rows(list(s.epoch(0))) for row in step]
    assert sorted(result) == sorted(expected)
    assert ranks[0].num_samples == len(expected)
    assert sum(len(targets) for _, targets in result) == sum(
        len(items) - 1 for items in stored(folder, "train")
    )
    histories = [set(items) for items in stored(folder, "train")]
    for batch in (b for s in ranks for step in s.epoch(0) for b in step.micro_batches):
        for row, items, targets in zip(
            batch.negative_ids, batch.item_ids.tolist(), batch.target_ids.tolist(), strict=True
        ):
            inside = set(items + targets) - {0}
            if inside:  # outside some user's whole history, not only outside the window
                assert any(
                    inside <= history and not history & set(row.flatten().tolist())
                    for history in histories
                )


@pytest.mark.parametrize("max_len", [1, 3, WHOLE])
@pytest.mark.parametrize("long_histories", ["truncate", "windows"])
@pytest.mark.parametrize("pool", [1, 2])
def test_prefixes_hold_every_target_once_at_their_end(
    folder: Path, max_len: int, long_histories: str, pool: int
) -> None:
    keys = {
        "max_len": max_len,
        "samples": "prefixes",
        "long_histories": long_histories,
        "num_negatives": 2,
        "length_pool": pool,
    }
    expected = []
    for items in stored(folder, "train"):
        recent = items if long_histories == "windows" else items[-max_len - 1 :]
        for end in range(1, len(recent)):
            expected.append((recent[max(0, end - max_len) : end], (recent[end],)))
    for micro in (2, 4):
        ranks = [stream(folder, 8, rank, 2, micro, **keys) for rank in range(2)]
        steps = [list(s.epoch(1)) for s in ranks]
        result = [row[1:] for rank in steps for step in all_rows(rank) for row in step]
        assert sorted(result) == sorted(expected)
        assert ranks[0].num_samples == len(expected)
        for step, other in zip(*steps, strict=True):
            pair = [row for block in all_rows([step, other]) for row in block]
            assert step.num_targets == step.num_sequences == len(pair)
            assert step.num_positions == sum(len(items) for _, items, _ in pair)
            assert step[1:] == other[1:]
    histories = [set(items) for items in stored(folder, "train")]
    for batch in (b for rank in steps for step in rank for b in step.micro_batches):
        ends = (batch.item_ids != PADDING_IDX).sum(1) - 1
        for end, items, targets, drawn in zip(
            ends.tolist(), batch.item_ids, batch.target_ids, batch.negative_ids, strict=True
        ):
            if end >= 0:
                assert targets.nonzero().flatten().tolist() == [end]
                inside = {*items.tolist(), int(targets[end])} - {0}
                assert any(
                    inside <= history and not history & set(drawn[end].tolist())
                    for history in histories
                )


def test_prefixes_are_the_same_at_any_step(folder: Path) -> None:
    keys = {"max_len": 3, "samples": "prefixes"}
    whole = list(stream(folder, **keys).epoch(2))
    assert same(list(stream(folder, **keys).epoch(2, 5)), whole[5:])
    assert same(list(stream(folder, num_workers=2, **keys).epoch(2, 5)), whole[5:])
    assert not same(list(stream(folder, **keys).epoch(1)), whole)


def test_masked_items_have_no_prefixes(folder: Path) -> None:
    with pytest.raises(ConfigError, match="predicts masked items") as caught:
        stream(folder, samples="prefixes", objective=Objective(cloze_ratio=0.5))
    assert "data.samples=histories" in caught.value.remedy


def test_windows_of_an_older_manifest_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    values = json.loads((copy / "manifest.json").read_text())
    values["schema_version"] = 1
    del values["checksum"]
    for split in values["splits"].values():
        for shard in split["shards"]:
            del shard["lengths"]
    (copy / "manifest.json").write_text(json.dumps(values))
    assert same(list(stream(copy).epoch(0)), list(stream(folder).epoch(0)))
    for field, value in (("long_histories", "windows"), ("samples", "prefixes")):
        with pytest.raises(DataError, match="did not count the lengths") as caught:
            stream(copy, **{field: value})
        assert f"data.{field}={value}" in caught.value.rule
        assert "prepare" in caught.value.remedy


BEAUTY = {
    2: 0,
    3: 7100,
    4: 4420,
    5: 2860,
    6: 1950,
    7: 1350,
    8: 960,
    10: 1200,
    13: 900,
    17: 600,
    24: 500,
    40: 300,
    80: 200,
}
"""About how many training histories of Amazon Beauty have how many items: 22,340 histories, 6.9
items on average.
"""


def padding(steps: list[StepBatches], width: int | None = None) -> float:
    """Share of padding among the positions of padded batches."""
    batches = [batch.item_ids for step in steps for batch in step.micro_batches]
    real = sum(int((b != PADDING_IDX).sum()) for b in batches)
    return 1 - real / sum(b.shape[0] * (width or b.shape[1]) for b in batches)


@pytest.fixture(scope="module")
def like_beauty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("beauty")
    random = np.random.default_rng(0)
    lengths = random.permutation(np.repeat(list(BEAUTY), list(BEAUTY.values())))
    lines = [
        f"u{u} " + " ".join(map(str, random.integers(0, 500, size=n + 2)))
        for u, n in enumerate(lengths)
    ]
    (root / "raw.txt").write_text("\n".join(lines) + "\n")
    config = PrepareConfig(
        format="sequences", user_core=1, item_core=1, duplicates="keep", sequences_per_shard=1024
    )
    prepare(str(root / "raw.txt"), root / "data", config, log=lambda _: None)
    return root / "data"


def test_little_padding_is_computed(like_beauty: Path) -> None:
    plain = list(stream(like_beauty, 256, max_len=50).epoch(0))
    pooled = list(stream(like_beauty, 256, micro=32, max_len=50, length_pool=16).epoch(0))
    assert padding(plain, 50) > 0.8  # what plain padding to 50 costs
    assert padding(plain) > 0.8
    assert padding(pooled) < 0.1
    sizes = {len(Packing(batch.item_ids).columns) for batch in plain[0].micro_batches}
    assert sizes == {
        plain[0].num_positions
    }  # position-wise layers: nothing of the padding, at any setting
    assert sorted(r[1:] for s in all_rows(pooled) for r in s) == sorted(
        r[1:] for s in all_rows(plain) for r in s
    )


@pytest.mark.parametrize("pool", [2, 3, 50])
def test_batches_of_like_length_are_exact_too(folder: Path, pool: int) -> None:
    whole = list(stream(folder, 8, length_pool=pool, num_negatives=1).epoch(1))
    assert sorted(row[0] for step in all_rows(whole) for row in step) == list(range(NUM_USERS))
    for world in (2, 4):
        ranks = [
            list(stream(folder, 8, rank, world, 2, length_pool=pool, num_negatives=1).epoch(1))
            for rank in range(world)
        ]
        for number, step in enumerate(whole):
            assert sorted(r for steps in ranks for r in all_rows(steps)[number]) == sorted(
                all_rows(whole)[number]
            )
            assert {steps[number][1:] for steps in ranks} == {step[1:]}
    assert same(list(stream(folder, 8, length_pool=pool, num_negatives=1).epoch(1, 4)), whole[4:])

    def spread(steps: list[StepBatches]) -> int:
        sizes = [[len(history) for _, history, _ in rows] for rows in all_rows(steps)]
        return sum(max(batch) - min(batch) for batch in sizes)

    assert spread(whole) < 0.8 * spread(list(stream(folder, 8).epoch(1)))
    lengths = [step.num_positions for step in list(stream(folder, 4, length_pool=50).epoch(0))]
    assert lengths not in (
        sorted(lengths),
        sorted(lengths, reverse=True),
    )  # the batches are shuffled again


def test_the_shuffle_comes_close_to_a_full_one(like_beauty: Path) -> None:
    """With 8 of 22 shards in a window: where a batch's samples lie in the store, against a full
    shuffle of all.
    """
    order = EpochOrder(
        np.array(
            [shard.num_sequences for shard in load_manifest(like_beauty).splits["train"].shards]
        ),
        8,
        0,
        0,
    )
    firsts = np.concatenate([[0], np.cumsum(order.counts)])
    windows = [
        np.concatenate([np.arange(firsts[i], firsts[i + 1]) for i in shards])
        for shards in order.windows
    ]
    stored_at = np.concatenate([window[order.permutation(n)] for n, window in enumerate(windows)])
    total = len(stored_at)
    assert sorted(stored_at) == list(range(total))
    full = np.random.default_rng(1).permutation(total)

    def spread(places: np.ndarray) -> float:
        return (
            float(np.mean([places[i : i + 256].std() for i in range(0, total - 256, 256)])) / total
        )

    def kept_neighbours(places: np.ndarray) -> float:
        return float(np.mean(np.abs(np.diff(places)) == 1))

    assert spread(full) == pytest.approx(12**-0.5, rel=0.02)
    assert spread(stored_at) > 0.85 * spread(full)  # one shard alone would have 1 / 22 of it
    assert kept_neighbours(stored_at) < 0.001  # a full shuffle keeps 0.0001, the stored order all
    assert abs(np.corrcoef(stored_at, np.arange(total))[0, 1]) < 0.5
    in_window = stored_at[: order.starts[1]].argsort().argsort()
    assert abs(np.corrcoef(in_window, np.arange(len(in_window)))[0, 1]) < 0.05
