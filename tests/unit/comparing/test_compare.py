"""`mltfr compare`: what it reads, what it refuses, and numbers that a reader can work out by
hand.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from mltfr_dist.cli import main as mltfr
from mltfr_dist.errors import ConfigError, DataError, MltfrError
from mltfr_dist.training.comparing.compare import (
    Options,
    compare_runs,
    verdict,
)
from mltfr_dist.training.comparing.values import user_values
from mltfr_dist.training.evaluating.user_ranks import KEY

PROTOCOL = {
    "data": "manifest 0",
    "split": "leave_one_out",
    "candidates": "all 40 items",
    "seen items": "left out",
    "ties": "pessimistic",
}
QUICK = Options(resamples=200)


def write_ranks(
    path: Path,
    ranks: Sequence[float],
    *,
    model: str | None = None,
    seed: int | None = None,
    rules: dict[str, str] | None = None,
    **columns: Any,
) -> Path:
    """A file of ranks of users u0, u1, ...; without ``model`` it is from elsewhere."""
    number = len(ranks)
    values = {
        "user": [f"u{n}" for n in range(number)],
        "target": [f"i{n % 7}" for n in range(number)],
        "rank": np.asarray(ranks, np.float64),
    }
    table = pa.table({**values, **columns})
    about = {
        "model": model,
        "model_sha256": model,
        "seed": seed,
        "picked_on": "valid",
        "protocol": PROTOCOL | (rules or {}),
    }
    if model:
        table = table.replace_schema_metadata({KEY: json.dumps(about).encode()})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return path


def drawn(users: int, seed: int, better: float = 1.0) -> np.ndarray:
    """Ranks, the lower the smaller ``better``."""
    return np.ceil(np.random.default_rng(seed).exponential(12 * better, users)) + 0.0


def test_numbers_by_hand(tmp_path: Path) -> None:
    """Ranks 1 and 3 have NDCG@10 1 and 1/2, 11 has none."""
    a = write_ranks(tmp_path / "a.parquet", [3, 3, 11, 1], model="a", popularity=[0, 2, 4, 6])
    b = write_ranks(tmp_path / "b.parquet", [1, 3, 1, 3], model="b")
    result = compare_runs([a, b], "test", QUICK)
    (one,) = result.differences
    assert result.means["a"]["NDCG@10"] == pytest.approx(0.5)
    assert one.changes["NDCG@10"].difference == pytest.approx((0.5 + 0 + 1 - 0.5) / 4)
    assert one.changes["HR@10"].difference == pytest.approx(0.25)
    assert (one.wins, one.losses, one.ties) == (2, 1, 1)
    assert one.effect == pytest.approx(0.25 / np.std([0.5, 0, 1, -0.5], ddof=1))
    # Of the signs of 0.5, 1 and -0.5 six in eight give a sum of 1 or more, up or down.
    assert one.p == pytest.approx(6 / 8, abs=0.13)
    (block,) = one.slices  # the others have one user each
    assert (block.name, block.users) == ("rare target (2..4)", 2)
    assert (block.wins, block.losses, block.change.difference) == (1, 0, 0.5)


def test_runs_that_differ_in_their_seed_are_one_model(tmp_path: Path) -> None:
    files = [
        write_ranks(
            tmp_path / f"{model}-{seed}" / "ranks.parquet",
            drawn(60, seed, better),
            model=model,
            seed=seed,
        )
        for model, better in (("bare", 1.0), ("full", 0.3))
        for seed in (1, 0, 2)
    ]
    result = compare_runs(files, "test", QUICK)
    assert [m.label for m in result.models] == ["bare", "full"]
    assert result.models[0].seeds == (0, 1, 2)
    (one,) = result.differences
    assert one.paired_seeds == ((0, 0), (1, 1), (2, 2))
    paired = [
        user_values(result.models[1].ranks[[s]], "NDCG@10", np.arange(60))[0]
        - user_values(result.models[0].ranks[[s]], "NDCG@10", np.arange(60))[0]
        for s in range(3)
    ]
    assert one.spread.mean == pytest.approx(np.mean(paired))
    assert one.spread.num_seeds == 3
    assert verdict(one, QUICK) == "better"
    again = write_ranks(tmp_path / "copy.parquet", drawn(60, 0), model="bare", seed=0)
    with pytest.raises(DataError, match="same model with the same seed"):
        compare_runs([*files, again], "test", QUICK)


def test_order_and_kind_of_foreign_ids_do_not_matter(tmp_path: Path) -> None:
    ours = write_ranks(
        tmp_path / "a.parquet", drawn(50, 0), model="a", user=[str(n) for n in range(50)]
    )
    order = np.random.default_rng(1).permutation(50)
    theirs = write_ranks(
        tmp_path / "theirs.parquet",
        drawn(50, 5)[order],
        user=order,
        target=[f"i{n % 7}" for n in order],
        split=["test"] * 50,
    )
    result = compare_runs([ours, theirs], "test", QUICK)
    values = [user_values(drawn(50, seed)[None], "MRR", np.arange(50)).mean() for seed in (0, 5)]
    assert [result.means[name]["MRR"] for name in ("a", "theirs")] == pytest.approx(values)
    assert result.unknown == (str(theirs),)
    theirs_values, our_values = (
        user_values(drawn(50, seed)[None], "NDCG@10", np.arange(50))[0] for seed in (5, 0)
    )
    theirs_p = stats.permutation_test(
        (theirs_values - our_values,),
        np.mean,
        permutation_type="samples",
        n_resamples=2_000,
        rng=np.random.default_rng(0),
    ).pvalue
    assert result.differences[0].p == pytest.approx(theirs_p, abs=0.15)


def test_many_comparisons_are_corrected_and_nothing_differs_by_chance(tmp_path: Path) -> None:
    files = [write_ranks(tmp_path / f"m{n}.parquet", drawn(80, n), model=f"m{n}") for n in range(4)]
    result = compare_runs(files, "test", Options(resamples=500, margin=0.3))
    p = np.array([d.p for d in result.differences])
    assert min(d.p_holm for d in result.differences) == pytest.approx(min(1, 3 * p.min()))
    assert {verdict(d, result.options) for d in result.differences} == {"equivalent within +-0.3"}


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"data": "manifest 1"}, r"differ in data \(manifest 0 there, manifest 1 here\)"),
        ({"split": "global_temporal"}, "differ in split"),
        ({"candidates": "100 sampled"}, "differ in candidates"),
        ({"seen items": "kept", "ties": "mean"}, "differ in seen items .*; ties"),
    ],
)
def test_other_rules_are_refused_and_named(
    tmp_path: Path, rules: dict[str, str], said: str
) -> None:
    a = write_ranks(tmp_path / "a.parquet", [1, 2], model="a")
    b = write_ranks(tmp_path / "b.parquet", [1, 2], model="b", rules=rules)
    with pytest.raises(DataError, match=said):
        compare_runs([a, b], "test", QUICK)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"user": ["u0", "u1", "u9"]}, r"1 users only in .*a.parquet \(u2\) and 1 users only in"),
        ({"target": ["i0", "i5", "i2"]}, "ranks i5 for user u1.* i1; 1 users"),
        (
            {"user": ["u0", "u1", "u1"], "target": ["i0", "i1", "i1"]},
            "holds user u1 with the target i1 more than once",
        ),
        (
            {"user": ["u0", "u1", "u1"], "rank": [1.0, 2.0, 2.0]},
            "gives two targets of user u1 the rank 2",
        ),
        ({"rank": [1.0, 0.0, 2.0]}, "gives user u1 the rank 0"),
        ({"rank": [1.0, None, 2.0]}, "has no rank for user u1"),
        ({"rank": ["1", "two", "3"]}, "a column rank of type string"),
        ({"rank": [True, True, True]}, "a column rank of type bool"),
        ({"history_length": [1, None, 3]}, "no history_length for user u1.*leave out the column"),
        ({"popularity": ["a", "b", "c"]}, "a column popularity of type string"),
        ({"user": ["u0", None, "u2"]}, "1 rows without a user"),
        ({"target": [[1], [2], [3]]}, "a column target of type list"),
        ({"split": ["valid"] * 3}, "no ranks of the test split"),
    ],
)
def test_other_users_and_what_is_no_rank(
    tmp_path: Path, columns: dict[str, Any], said: str
) -> None:
    a = write_ranks(tmp_path / "a.parquet", [1, 2, 3], model="a")
    b = write_ranks(tmp_path / "b.parquet", [1, 2, 3], **columns)
    with pytest.raises(DataError, match=said):
        compare_runs([a, b], "test", QUICK)


def test_fewer_users_are_refused_too(tmp_path: Path) -> None:
    a = write_ranks(tmp_path / "a.parquet", [1, 2, 3], model="a")
    b = write_ranks(tmp_path / "b.parquet", [1, 2], model="b")
    for pair in ([a, b], [b, a]):
        with pytest.raises(DataError, match=r"1 users only in .*a\.parquet"):
            compare_runs(pair, "test", QUICK)


def test_what_cannot_be_compared_at_all(tmp_path: Path) -> None:
    a = write_ranks(tmp_path / "a.parquet", [1, 2], model="a")
    pq.write_table(pa.table({"user": ["u"]}), tmp_path / "short.parquet")
    (tmp_path / "text.parquet").write_text("text")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("name: run\n")
    (tmp_path / "empty").mkdir()
    pq.write_table(pa.table({"variant": ["bare"]}), tmp_path / "matrix.parquet")
    for name, said in {
        "short.parquet": "no column target, rank",
        "text.parquet": "cannot be read as Parquet",
        "run": "evaluate .*run --save-ranks",
        "empty": "holds no run",
        "matrix.parquet": "name no files of ranks",
        "nothing": "does not exist",
    }.items():
        with pytest.raises(DataError, match=said):
            compare_runs([a, tmp_path / name], "test", QUICK)
    with pytest.raises(ConfigError, match="one model to compare, a"):
        compare_runs([a, a], "test", QUICK)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"metric": "NDGC@10"}, "no metric `NDGC@10`.*NDCG"),
        ({"metric": "NDCG"}, "no metric `NDCG`"),
        ({"metric": "MRR@5"}, "no metric `MRR@5`"),
        ({"margin": -1.0}, "margin is -1"),
        ({"resamples": 5}, "5 resamples"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, Any], said: str) -> None:
    with pytest.raises(MltfrError, match=said):
        Options(**options)


def test_the_command_prints_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = {"history_length": np.arange(90), "popularity": np.arange(90) // 3}
    a = write_ranks(tmp_path / "a.parquet", drawn(90, 0), model="a", seed=0, **lengths)
    b = write_ranks(tmp_path / "b.parquet", drawn(90, 1, 0.2), model="b", seed=0)
    output = tmp_path / "out"
    given = [str(a), "--margin", "0.02", str(b), "--output", str(output), "--resamples", "300"]
    assert mltfr(["compare", *given]) == 0
    shown = capsys.readouterr().out
    assert "300 resamples, seed 0; with one seed they hold for these trained models alone" in shown
    assert "candidates all 40 items" in shown
    values = json.loads((output / "compare.json").read_text())
    (one,) = values["differences"]
    assert sum(block["users"] for block in one["slices"][-3:]) == 90
    assert one["slices"][0]["name"] == "cold target (not in training)"
    assert one["slices"][0]["users"] == 3
    assert one["changes"]["NDCG@10"]["low"] > 0
    assert f"{one['changes']['NDCG@10']['difference']:+.4f}" in shown
    assert "| b |" in (output / "compare.md").read_text()
    assert (output / "compare.png").read_bytes()[:4] == b"\x89PNG"
    assert mltfr(["compare", str(a), str(b), "--metric", "MRR", "--resamples", "100"]) == 0
    shown = capsys.readouterr().out
    assert "MRR, difference to a" in shown
    assert "p (Holm) of" not in shown  # no margin, no equivalence
    assert mltfr(["compare", str(a), str(tmp_path / "c.parquet")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert mltfr(["compare", *given[:-4], "--output", str(a), "--resamples", "100"]) == 2
    assert "a.parquet cannot be written" in capsys.readouterr().err
