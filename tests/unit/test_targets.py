"""Several targets a user in a temporal split: from preparation to metrics, against plain loops."""

from __future__ import annotations

import json
import math
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import write_periods
from torch import Tensor

from mltfr_dist.config import EvaluationConfig, PrepareConfig
from mltfr_dist.data.batch import RankingBatch
from mltfr_dist.data.shards.manifest import Manifest, SplitInfo, load_manifest, read_map
from mltfr_dist.data.shards.packed import PackedSequences
from mltfr_dist.data.shards.reader import read_shard
from mltfr_dist.data.shards.writer import SplitWriter
from mltfr_dist.data.stream.ranking import RankingStream
from mltfr_dist.distributed.ranks import ALONE
from mltfr_dist.errors import DataError
from mltfr_dist.metrics import metric_sums, target_ranks
from mltfr_dist.training.evaluating.evaluate import Ranked, rank_users
from mltfr_dist.training.evaluating.rankers import ByScores

NUM_USERS, NUM_ITEMS, CUT, SECOND_CUT = 40, 30, 700, 850


class Prepared(NamedTuple):
    folder: Path
    manifest: Manifest
    histories: dict[str, list[tuple[int, int]]]
    """By user, (item number, time) in the order of time."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("targets")
    rows = write_periods(folder, "data", targets="all")
    manifest = load_manifest(folder / "data")
    numbers = numbers_of(folder / "data", manifest)
    histories: dict[str, list[tuple[int, int]]] = {}
    for user, item, time in rows:
        histories.setdefault(user, []).append((numbers[item], time))
    return Prepared(folder / "data", manifest, dict(sorted(histories.items())))


def numbers_of(folder: Path, manifest: Manifest) -> dict[str, int]:
    table = read_map(folder, manifest, "items.parquet")
    return dict(zip(table["item_id"].to_pylist(), table["item_index"].to_pylist(), strict=True))


def expected(prepared: Prepared, split: str) -> list[tuple[list[int], list[int]]]:
    """Of each user of a split the history and the different targets, by times alone."""
    start, end = {"valid": (CUT, SECOND_CUT), "test": (SECOND_CUT, 1000)}[split]
    result = []
    for rows in prepared.histories.values():
        history = [item for item, time in rows if time < start]
        targets = list(dict.fromkeys(item for item, time in rows if start <= time < end))
        result += [(history, targets)] if history and targets else []
    return result


@pytest.mark.parametrize("split", ["valid", "test"])
def test_the_shards_hold_every_item_of_the_period(prepared: Prepared, split: str) -> None:
    assert prepared.manifest.schema_version == 4
    assert prepared.manifest.report.cut_times == (str(CUT), str(SECOND_CUT))
    info, users = prepared.manifest.splits[split], expected(prepared, split)
    stored = []
    for shard in info.shards:
        sequences = read_shard(prepared.folder, shard, num_items=NUM_ITEMS)
        rows, items = sequences.distinct_targets()
        for row in range(len(sequences)):
            history = sequences[row][: -sequences.num_targets[row]].tolist()
            stored.append((history, items[rows == row].tolist()))
    assert stored == users
    assert info.num_targets == sum(len(targets) for _, targets in users)
    assert info.num_targets > 2 * info.num_sequences
    repeated = sum(int(s.num_targets.sum()) for s in sequences_of(prepared, split))
    assert repeated > info.num_targets  # items that come again within the period


def sequences_of(prepared: Prepared, split: str) -> list:
    shards = prepared.manifest.splits[split].shards
    return [read_shard(prepared.folder, shard, num_items=NUM_ITEMS) for shard in shards]


def test_next_is_the_first_item_of_the_period_and_as_it_was(prepared: Prepared) -> None:
    folder = prepared.folder.parent / "next"
    write_periods(folder.parent, folder.name, targets="next")
    manifest = load_manifest(folder)
    numbers = numbers_of(folder, manifest)
    assert numbers == numbers_of(prepared.folder, prepared.manifest)
    assert manifest.splits["train"] == prepared.manifest.splits["train"]  # to the byte
    written = json.loads((folder / "manifest.json").read_text())
    assert written["schema_version"] == 3
    assert "targets" not in written["prepare"]
    assert not any("num_targets" in s for s in written["splits"]["test"]["shards"])
    info = manifest.splits["test"]
    assert all(shard.num_targets is None for shard in info.shards)
    packed = [read_shard(folder, shard, num_items=NUM_ITEMS) for shard in info.shards]
    assert all(block.targets is None for block in packed)
    result = [
        (block[n][:-1].tolist(), int(block[n][-1])) for block in packed for n in range(len(block))
    ]
    assert result == [(history, targets[0]) for history, targets in expected(prepared, "test")]


def test_shards_whose_targets_cannot_be_are_refused(tmp_path: Path) -> None:
    def written(name: str, *targets: int) -> SplitInfo:
        writer = SplitWriter(
            tmp_path, name, num_items=9, num_users=2, sequences_per_block=2, sequences_per_shard=2
        )
        items, offsets = np.array([1, 2, 3, 4, 5, 5]), np.array([0, 3, 6])
        writer.add(PackedSequences(items, offsets, np.arange(2), np.array(targets)))
        return writer.finish()

    for name, number in (("none", 0), ("all", 3)):
        (info,) = written(name, number, 1).shards
        with pytest.raises(DataError, match="no target, or no history before its targets"):
            read_shard(tmp_path, info, num_items=9)
    (info,) = written("whole", 1, 2).shards
    assert info.num_targets == 2  # item 5 comes again
    assert read_shard(tmp_path, info, num_items=9).num_targets.tolist() == [1, 2]
    for number, said in ((3, "it has 2 targets, the manifest says 3"), (None, "targets.npy")):
        changed = info.model_copy(update={"num_targets": number})
        with pytest.raises(DataError, match=said):
            read_shard(tmp_path, changed, num_items=9)


def test_only_periods_have_several_targets() -> None:
    with pytest.raises(ValueError, match="--targets all needs --split global_temporal"):
        PrepareConfig(targets="all")


def stream(prepared: Prepared, split: str, size: int, rank: int = 0, world: int = 1) -> object:
    return RankingStream(
        prepared.folder, split, max_len=4, batch_size=size, rank=rank, world_size=world
    )


@pytest.mark.parametrize("size", [1, 5, 64, 1000])
@pytest.mark.parametrize("world", [1, 3])
def test_batches_hold_every_target_once(prepared: Prepared, size: int, world: int) -> None:
    result: dict[int, tuple[list[int], list[int]]] = {}
    for batch in chain(*(stream(prepared, "test", size, rank, world) for rank in range(world))):
        assert len(batch.target_ids) <= size
        if batch.target_rows is None:  # only fills
            assert batch.target_ids.tolist() == [0]
            continue
        for row, number in enumerate(batch.numbers.tolist()):
            seen = batch.seen_items[batch.seen_rows == row].tolist()
            recent = [item for item in batch.item_ids[row].tolist() if item]
            assert recent == seen[-4:]
            own = batch.target_ids[batch.target_rows == row].tolist()
            assert own
            history, targets = result.setdefault(number, (seen, []))
            assert history == seen
            targets += own
    assert [result[n] for n in range(len(result))] == expected(prepared, "test")


def test_each_user_comes_once_where_histories_alone_are_read(prepared: Prepared) -> None:
    batches = RankingStream(prepared.folder, "test", max_len=99, batch_size=6, once_a_user=True)
    result = [
        (batch.seen_items[batch.seen_rows == row].tolist(), int(batch.target_ids[row]))
        for batch in batches
        for row in range(len(batch.item_ids))
    ]
    assert result == [(history, targets[0]) for history, targets in expected(prepared, "test")]


# --- metrics ------------------------------------------------------------------------------------


def by_definition(ranks: list[float], k: int) -> dict[str, float]:
    """The metrics of a user by textbook loops over the targets' places in the ranking."""
    ranks = sorted(ranks)
    hits = [rank for rank in ranks if rank <= k]
    best = sum(1 / math.log2(place + 1) for place in range(1, min(k, len(ranks)) + 1))
    return {
        f"HR@{k}": float(bool(hits)),
        f"NDCG@{k}": sum(1 / math.log2(rank + 1) for rank in hits) / best,
        f"MAP@{k}": sum((i + 1) / rank for i, rank in enumerate(hits)) / len(ranks),
        f"Precision@{k}": len(hits) / k,
        f"Recall@{k}": len(hits) / len(ranks),
        "MRR": 1 / ranks[0],
    }


def test_metrics_by_hand() -> None:
    """One user has targets at 1, 3 and 12, another one at 4; K = 3."""
    ranks, users = torch.tensor([3.0, 12.0, 1.0, 4.0]), torch.tensor([0, 0, 0, 1])
    sums = metric_sums(ranks, (3,), users)
    assert sums == pytest.approx(
        {
            "HR@3": 1,
            "NDCG@3": (1 + 1 / 2) / (1 + 1 / math.log2(3) + 1 / 2),
            "MAP@3": (1 / 1 + 2 / 3) / 3,
            "Precision@3": 2 / 3,
            "Recall@3": 2 / 3,
            "MRR": 1 + 1 / 4,
        },
        rel=1e-12,
    )
    assert sum(by_definition([3, 12, 1], 3).values()) == pytest.approx(sum(sums.values()) - 1 / 4)


def test_one_target_a_user_and_no_order_changes_the_figures() -> None:
    draws = torch.Generator().manual_seed(0)
    ranks = torch.randint(1, 500, (3000,), generator=draws).double()
    alone = metric_sums(ranks, (5, 10), torch.arange(3000))
    assert alone == pytest.approx(metric_sums(ranks, (5, 10)), rel=1e-13)
    order, users = torch.randperm(3000, generator=draws), torch.arange(3000) // 4
    ranks += torch.arange(3000) % 4 * 500  # of one user all different
    mixed = metric_sums(ranks[order], (5, 10), users[order])
    assert mixed == metric_sums(ranks, (5, 10), users)


@pytest.mark.parametrize(
    ("ties", "ranks"),
    [("pessimistic", [4, 5, 1]), ("mean", [3, 4, 1]), ("optimistic", [2, 3, 1])],
)
def test_tied_targets_of_a_user_have_places_of_their_own(ties, ranks) -> None:
    """Places 2 to 5 are of four tied items, two of them targets; the third target is at 1."""
    better, equal, users = torch.tensor([1, 1, 0]), torch.tensor([3, 3, 0]), torch.tensor([7, 7, 7])
    expected_mean = {"mean": [1 + 5 / 3, 1 + 10 / 3, 1]}.get(ties, ranks)
    assert target_ranks(better, equal, ties, users).tolist() == pytest.approx(expected_mean)
    apart = target_ranks(better, equal, ties, torch.tensor([1, 2, 3]))
    assert torch.equal(apart, target_ranks(better, equal, ties))


def scores_of(seed: int, levels: int) -> Tensor:
    """Scores [users, items + 1]; few levels make ties."""
    draws = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (NUM_USERS, NUM_ITEMS + 1), generator=draws).float()
    scores[:, 0] = -math.inf
    return scores


def ranked(prepared: Prepared, scores: Tensor, config: EvaluationConfig, batches) -> Ranked:
    def score(batch: RankingBatch) -> Tensor:
        return scores[batch.numbers] if batch.numbers is not None else scores[:1]

    return rank_users(ByScores(score, NUM_ITEMS), batches, config, ALONE)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    levels=st.sampled_from([3, 1 << 20]),
    size=st.sampled_from([1, 7, 1000]),
    world=st.sampled_from([1, 2, 3]),
    filter_seen=st.booleans(),
    split=st.sampled_from(["valid", "test"]),
)
def test_ranks_are_places_in_one_ranking(
    prepared: Prepared, seed, levels, size, world, filter_seen, split
) -> None:
    """The ranking sorts all candidates; among ties the user's targets stand last."""
    scores, config = scores_of(seed, levels), EvaluationConfig(filter_seen=filter_seen)
    users, places, sums = expected(prepared, split), [], {}
    for number, (history, targets) in enumerate(users):
        candidates = set(range(1, NUM_ITEMS + 1))
        if filter_seen:
            candidates -= set(history) - set(targets)
        row = scores[number].tolist()
        order = sorted(candidates, key=lambda item: (-row[item], item in targets))
        own = [float(order.index(target) + 1) for target in targets]
        places.append(own)
        for name, value in by_definition(own, 5).items():
            sums[name] = sums.get(name, 0.0) + value
    batches = [stream(prepared, split, size, rank, world) for rank in range(world)]
    result = ranked(prepared, scores, config, chain(*batches))
    assert result.num_users == len(users)
    for number, own in enumerate(places):
        assert sorted(result.ranks[result.users == number].tolist()) == sorted(own)
    metrics = result.metrics((5,))
    assert metrics == pytest.approx({n: v / len(users) for n, v in sums.items()}, rel=1e-12)
    whole = ranked(prepared, scores, config, stream(prepared, split, 64))
    assert torch.equal(whole.ranks, result.ranks)
    assert whole.metrics((5,)) == metrics


def test_a_seen_target_stays_a_candidate_for_all_of_the_users_targets(prepared: Prepared) -> None:
    """Else two targets could have one rank."""
    users = expected(prepared, "test")
    again = [set(history) & set(targets) for history, targets in users]
    assert sum(map(len, again)) > 20
    result = ranked(
        prepared, scores_of(1, 1 << 20), EvaluationConfig(), stream(prepared, "test", 64)
    )
    pairs = torch.stack([result.users.double(), result.ranks], dim=1)
    assert len(pairs.unique(dim=0)) == len(pairs)
