"""Slices of the test metrics, worked by hand, and exact."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support import tiny_config

from mltfr_dist.config import EvaluationConfig
from mltfr_dist.data.batch import RankingBatch
from mltfr_dist.data.shards.short_parts import training_sequences
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.training.evaluating import slices
from mltfr_dist.training.evaluating.evaluate import ALL, evaluate, evaluate_slices
from mltfr_dist.training.evaluating.rankers import ByScores
from mltfr_dist.training.evaluating.slices import Slices, training_slices
from mltfr_dist.training.inputs import load_inputs
from mltfr_dist.training.streams import ranking_stream

ALONE = Ranks(0, 1, torch.device("cpu"))


def test_membership_by_hand() -> None:
    slices = Slices(torch.tensor([0, 0, 1, 2]), short=1, long=3)
    batch = RankingBatch(
        torch.ones(4, 1).long(),
        torch.tensor([1, 2, 3, 0]),
        torch.tensor([0, 1, 1, 2, 2, 2]),
        torch.tensor([3, 3, 1, 1, 2, 2]),
    )
    expected = [
        ["item_rare", "history_short"],
        ["item_middle", "history_middle"],
        ["item_common", "history_long"],
        [],
    ]
    result = slices.members(batch)
    assert [
        [name for name, m in zip(Slices.NAMES, row, strict=True) if m] for row in result.tolist()
    ] == expected


def test_thirds_are_those_of_a_stable_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "BLOCK", 4)
    draw = np.random.default_rng(0)
    for num_items in [*range(1, 12), 40, 41]:
        counts = draw.integers(0, 4, num_items + 1)
        order = np.argsort(counts[1:], kind="stable")
        expected = np.zeros(num_items + 1, dtype=np.int64)
        expected[order + 1] = np.arange(num_items) * 3 // num_items
        assert slices.thirds_of_items(counts).tolist() == expected.tolist()


def test_metrics_by_hand() -> None:
    # Ranks 1, 2, 3 of three users; slices {0, 1} and {2}.
    scores = torch.tensor([[-torch.inf, 3.0, 2.0, 1.0]]).repeat(3, 1)
    none = torch.zeros(0).long()
    batch = RankingBatch(torch.ones(3, 1).long(), torch.tensor([1, 2, 3]), none, none)
    member = torch.tensor([[True, False], [True, False], [False, True]])
    config = EvaluationConfig(cutoffs=(1, 10))
    result = evaluate_slices(
        ByScores(lambda _: scores, 3), [batch], config, ALONE, ("a", "b"), lambda _: member
    )
    assert result["a"]["HR@1"] == 1 / 2
    assert result["a"]["MRR"] == pytest.approx(3 / 4)
    assert result["b"]["MRR"] == pytest.approx(1 / 3)
    assert (result["a"]["users"], result["b"]["users"]) == (2, 1)
    assert result[ALL] == evaluate(ByScores(lambda _: scores, 3), [batch], config, ALONE)


def test_slices_of_real_data_partition_the_users_and_thirds_are_by_training_count(
    tmp_path: Path,
) -> None:
    config = tiny_config(tmp_path)
    manifest = load_inputs(config).manifest
    slices = training_slices(config, manifest)
    train = training_sequences(config.data.path, manifest)
    counts = torch.bincount(
        torch.from_numpy(train.items.astype("int64")), minlength=manifest.num_items + 1
    )
    thirds = [counts[1:][slices.item_third[1:] == third] for third in range(3)]
    assert max(map(len, thirds)) - min(map(len, thirds)) <= 1
    assert thirds[0].max() <= thirds[1].min() <= thirds[1].max() <= thirds[2].min()
    assert (train.lengths <= slices.short).mean() >= 1 / 3
    assert slices.long > slices.short

    def by_id(batch: RankingBatch) -> torch.Tensor:
        return torch.arange(manifest.num_items + 1.0).repeat(len(batch.target_ids), 1)

    blocks = []
    for rank in range(2):  # sums over ranks are sums over users
        stream = ranking_stream(config, "test", Ranks(rank, 2, torch.device("cpu")))
        blocks.append(
            evaluate_slices(
                ByScores(by_id, manifest.num_items),
                stream,
                config.evaluation,
                ALONE,
                Slices.NAMES,
                slices.members,
            )
        )
    whole_stream = ranking_stream(config, "test", ALONE)
    whole = evaluate_slices(
        ByScores(by_id, manifest.num_items),
        whole_stream,
        config.evaluation,
        ALONE,
        Slices.NAMES,
        slices.members,
    )
    users = manifest.splits["test"].num_sequences
    for group in (Slices.NAMES[:3], Slices.NAMES[3:]):
        assert sum(whole[name]["users"] for name in group) == users
        mean = sum(whole[name]["MRR"] * whole[name]["users"] for name in group) / users
        assert mean == pytest.approx(whole[ALL]["MRR"])
    for name in Slices.NAMES:
        assert sum(p[name]["users"] for p in blocks) == whole[name]["users"]


@pytest.mark.parametrize("num_items", [1, 2, 40])
def test_thirds_hold_equally_many_items(num_items: int, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = np.array([0, *np.random.default_rng(0).integers(0, 5, num_items)])
    monkeypatch.setattr(slices, "training_counts", lambda *_: (counts, np.array([2, 3, 4])))
    manifest: Any = SimpleNamespace(num_items=num_items)
    third = training_slices(None, manifest).item_third  # type: ignore[arg-type]
    order = sorted(range(1, num_items + 1), key=lambda item: (counts[item], item))
    expected = {item: place * 3 // num_items for place, item in enumerate(order)}
    assert {item: int(third[item]) for item in order} == expected
    assert third.element_size() == 1
