"""Full ranking, worked by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from support import tiny_config
from torch import Tensor

from mltfr_dist.config import EvaluationConfig, PrepareConfig
from mltfr_dist.data.batch import RankingBatch
from mltfr_dist.data.prepare.run import prepare
from mltfr_dist.data.stream.ranking import RankingStream
from mltfr_dist.distributed.ranks import Ranks
from mltfr_dist.metrics import metric_names
from mltfr_dist.models.folded import folded
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.training.build import build_model
from mltfr_dist.training.evaluating import rankers
from mltfr_dist.training.evaluating.evaluate import evaluate, rank_users
from mltfr_dist.training.evaluating.rankers import ByModel, ByScores, MeanLoss, SameForAll, excluded
from mltfr_dist.training.inputs import load_inputs
from mltfr_dist.training.streams import ranking_stream

ALONE = Ranks(0, 1, torch.device("cpu"))
NO = -math.inf


def config(**values: object) -> EvaluationConfig:
    return EvaluationConfig(**({"cutoffs": (1, 10)} | values))


def batch(targets: list[int], seen: list[list[int]]) -> RankingBatch:
    rows = [row for row, items in enumerate(seen) for _ in items]
    items = [item for row in seen for item in row]
    return RankingBatch(
        torch.ones(len(targets), 1).long(),
        torch.tensor(targets),
        torch.tensor(rows).long(),
        torch.tensor(items).long(),
    )


# Three users over items 1..5; user 1 has seen its own target; user 2's row only fills the batch.
BATCH = batch([4, 2, 0], [[1, 2], [2, 5, 2], []])
SCORES = torch.tensor(
    [[NO, 9.0, 8.0, 5.0, 6.0, 7.0], [NO, 4.0, 3.0, 1.0, 2.0, 9.0], [NO, 1.0, 1.0, 1.0, 1.0, 1.0]]
)


def test_seen_items_and_the_target_itself_are_no_competitors() -> None:
    pairs = excluded(BATCH, filter_seen=True)
    result = {*zip(pairs.rows.tolist(), pairs.item_ids.tolist(), strict=True)}
    assert result == {(0, 4), (0, 1), (0, 2), (1, 2), (1, 5)}
    pairs = excluded(BATCH, filter_seen=False)
    assert (pairs.rows.tolist(), pairs.item_ids.tolist()) == ([0, 1], [4, 2])


@pytest.mark.parametrize("ties", ["pessimistic", "mean", "optimistic"])
@pytest.mark.parametrize("filter_seen", [False, True])
def test_scores_that_are_everyones_place_as_their_product_with_users_does(
    ties: str, filter_seen: bool
) -> None:
    draw = torch.Generator().manual_seed(0)
    one = SameForAll(torch.randint(0, 6, (31,), generator=draw).float())
    histories = [torch.randint(1, 31, (n % 9,), generator=draw).tolist() for n in range(40)]
    targets = torch.randint(1, 31, (40,), generator=draw).tolist()
    targets[7], histories[7] = 0, []  # fills the batch
    targets[9] = histories[9][0] if histories[9] else targets[9]
    users, rules = batch(targets, histories), config(ties=ties, filter_seen=filter_seen)
    result = rank_users(one.count, [users], rules, ALONE).ranks
    assert result.equal(rank_users(ByScores(one, 30), [users], rules, ALONE).ranks)
    assert len(set(result.tolist())) > 4


def test_ranks_come_in_the_order_of_the_split() -> None:
    named = BATCH._replace(numbers=torch.tensor([7, 3, 9]))
    result = rank_users(
        ByScores(lambda _: SCORES, 5), [named], config(), ALONE, lambda _: torch.eye(3).bool()
    )
    assert result.ranks.tolist() == [2, 2]  # of user 1, then of user 0
    assert result.members.tolist() == [[False, True, False], [True, False, False]]


def test_metrics_with_seen_items_filtered() -> None:
    # Ranks: user 0: 7 above 6 -> 2; user 1: 4 above 3 -> 2. The filling row counts for nothing.
    metrics = evaluate(ByScores(lambda _: SCORES, 5), [BATCH], config(), ALONE)
    expected = {"HR@1": 0, "NDCG@1": 0, "HR@10": 1, "NDCG@10": 1 / math.log2(3), "MRR": 1 / 2}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_metrics_with_all_items_as_candidates() -> None:
    # Ranks: user 0: 9, 8, 7 above 6 -> 4; user 1: 9, 4 above 3 -> 3.
    metrics = evaluate(ByScores(lambda _: SCORES, 5), [BATCH], config(filter_seen=False), ALONE)
    expected = {
        "HR@1": 0,
        "NDCG@1": 0,
        "HR@10": 1,
        "NDCG@10": (1 / math.log2(5) + 1 / 2) / 2,
        "MRR": (1 / 4 + 1 / 3) / 2,
    }
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize(("ties", "rank"), [("pessimistic", 3), ("mean", 2), ("optimistic", 1)])
def test_the_tie_rule_is_the_configured_one(ties: str, rank: int) -> None:
    metrics = evaluate(
        ByScores(lambda _: torch.tensor([[NO, 1.0, 1.0, 1.0]]), 3),
        [batch([2], [[]])],
        config(ties=ties),
        ALONE,
    )
    assert metrics["MRR"] == pytest.approx(1 / rank)


def test_means_are_over_users_and_not_over_batches() -> None:
    first, second = batch([1], [[]]), batch([3, 3, 3], [[], [], []])
    score = lambda b: torch.tensor([[NO, 3.0, 2.0, 1.0]]).repeat(len(b.target_ids), 1)  # noqa: E731
    metrics = evaluate(ByScores(score, 3), [first, second], config(), ALONE)
    assert metrics["HR@1"] == pytest.approx(1 / 4)
    assert metrics["MRR"] == pytest.approx((1 + 3 / 3) / 4)


def test_batches_that_only_fill_give_zeros() -> None:
    metrics = evaluate(
        ByScores(lambda b: torch.zeros(len(b.target_ids), 4), 3),
        [batch([0], [[]])],
        config(),
        ALONE,
    )
    assert set(metrics.values()) == {0.0}
    assert list(metrics) == metric_names((1, 10))


@pytest.mark.parametrize("value", [math.nan, NO, math.inf])
def test_scores_that_have_no_rank_raise(value: float) -> None:
    """A NaN compares false with everything, so an unchecked baseline would rank first."""
    scores = SCORES.clone()
    scores[0, 4] = value  # user 0's target
    with pytest.raises(ValueError, match="scores hold NaN, or a target without"):
        evaluate(ByScores(lambda _: scores, 5), [BATCH], config(), ALONE)


def test_few_scores_are_held_at_a_time_and_ranks_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draws, held = torch.Generator().manual_seed(0), []
    seen = [torch.randint(1, 10, (n % 4,), generator=draws).tolist() for n in range(23)]
    users = batch(torch.randint(0, 10, (23,), generator=draws).tolist(), seen)
    users = users._replace(item_ids=torch.arange(23)[:, None], numbers=torch.arange(23))
    scores = torch.randint(4, (23, 10), generator=draws).float()
    scores[:, 0] = NO

    def score(b: RankingBatch) -> Tensor:
        held.append(len(b.target_ids))
        return scores[b.item_ids[:, 0]]

    whole = rank_users(ByScores(score, 9), [users], config(), ALONE).ranks
    monkeypatch.setattr(rankers, "HELD_SCORES", 30)
    blocks = rank_users(ByScores(score, 9), [users], config(), ALONE).ranks
    assert held == [23, *[3] * 7, 2]
    assert torch.equal(whole, blocks)
    assert whole.unique().numel() > 3


def test_an_oracle_over_real_data_is_perfect_at_any_batch_size(tmp_path: Path) -> None:
    (tmp_path / "raw.txt").write_text(
        "".join(
            f"u{u} " + " ".join(f"i{(u * k) % 17}" for k in range(1, 7)) + "\n"
            for u in range(1, 14)
        )
    )
    prepared = PrepareConfig(
        format="sequences",
        user_core=1,
        item_core=1,
        duplicates="keep",
        sequences_per_shard=5,
        sequences_per_block=3,
    )
    manifest = prepare(str(tmp_path / "raw.txt"), tmp_path / "data", prepared, log=lambda _: None)

    def oracle(b: RankingBatch) -> Tensor:
        return torch.nn.functional.one_hot(b.target_ids, manifest.num_items + 1).float()

    def by_id(b: RankingBatch) -> Tensor:
        return (
            torch.arange(manifest.num_items + 1.0)
            .repeat(len(b.target_ids), 1)
            .index_fill(1, torch.tensor([0]), NO)
        )

    results = []
    for size in (1, 4, 100):

        def stream(size: int = size) -> RankingStream:
            return RankingStream(tmp_path / "data", "test", max_len=3, batch_size=size)

        perfect = evaluate(ByScores(oracle, manifest.num_items), stream(), config(), ALONE)
        assert {perfect[name] for name in ("HR@1", "NDCG@1", "NDCG@10", "MRR")} == {1.0}
        results.append(evaluate(ByScores(by_id, manifest.num_items), stream(), config(), ALONE))
    assert results[0] == results[1] == results[2]
    assert 0 < results[0]["MRR"] < 1


@pytest.mark.parametrize("strategy", ["user_guided", "random_tokens", "learned_prototypes"])
def test_a_model_ranks_as_it_would_with_nothing_computed_before(
    strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What no history changes is computed once a pass: losses and ranks are equal to the bit."""
    config = tiny_config(tmp_path, mltfr__filter__strategy=strategy)
    torch.manual_seed(0)
    model = build_model(config, load_inputs(config, verify=False), with_consensus=True).eval()
    folds, found = [], []

    def told(given: Recommender) -> Recommender:
        folds.append(folded(given))
        return folds[-1]

    for fold in (told, lambda given: given):
        monkeypatch.setattr(rankers, "folded", fold)
        loss = MeanLoss(ALONE)
        users = rank_users(
            ByModel(model, loss), ranking_stream(config, "valid", ALONE), config.evaluation, ALONE
        )
        found.append((users.ranks.tolist(), loss.mean()))
    assert (folds[0] is not model) == (strategy != "random_tokens")
    assert found[0] == found[1]
    assert len(set(found[0][0])) > 10
