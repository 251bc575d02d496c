"""The matrix of runs: what each arm changes, resuming, and statistics worked by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from support import REPOSITORY, tiny_config

from benchmarks import quality
from mltfr_dist.cli import main as mltfr
from mltfr_dist.config import RunConfig
from mltfr_dist.config.published import MLTFR, NEEDS
from mltfr_dist.distributed.meeting import SINGLE_PROCESS
from mltfr_dist.distributed.ranks import ALONE
from mltfr_dist.errors import ConfigError, DataError
from mltfr_dist.training.evaluating.compare import baseline_result
from mltfr_dist.training.evaluating.user_ranks import KEY
from mltfr_dist.training.inputs import load_inputs
from mltfr_dist.training.reporting.matrix import (
    append_row,
    config_sha256,
    interval,
    is_done,
    make_row,
    read_rows,
    summary,
)
from mltfr_dist.training.run_folder import differing_fields
from mltfr_dist.training.running.fit import compare


def row(variant: str, seed: int, value: float) -> dict[str, object]:
    metrics = {"valid/NDCG@10": value, "test/NDCG@10": value, "test/HR@10": 2 * value}
    key = {
        "dataset": "d",
        "backbone": "sasrec",
        "variant": variant,
        "seed": seed,
        "config_sha256": "0",
    }
    return key | {"parameters": 10, "seconds": 1.0} | metrics


def differing(base: RunConfig, name: str) -> set[str]:
    made = quality.variant(name)(base)
    return {
        line.split(" is ")[0]
        for line in differing_fields(base.model_dump(mode="json"), made.model_dump(mode="json"))
    }


def test_interval_by_hand() -> None:
    # Sample deviation of 1, 2, 3 is 1; t(0.975, 2) = 4.3027.
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2
    assert half == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    mean, half = interval([0.5])
    assert mean == 0.5
    assert math.isnan(half)


def test_differences_are_paired_by_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.parquet"
    for seed, level in enumerate((0.1, 0.5, 0.9)):  # seeds differ far more than variants
        append_row(path, row("bare", seed, level))
        append_row(path, row("repaired", seed, level + 0.01 + 0.001 * seed))
    append_row(path, row("random_tables", 0, 0.1) | {"test/item_rare/HR@10": 0.5})  # a column more
    assert len(read_rows(path)) == 7
    assert mltfr(["report", str(path)]) == 0
    shown = capsys.readouterr().out
    to_bare, to_random = shown.split("difference to bare")[1].split("difference to random_tables")
    line = next(block for block in to_bare.splitlines() if block.startswith("repaired"))
    # By hand: deviation 0.001, half width 4.3027 * 0.001 / sqrt(3), detectable 3.264 deviations.
    numbers = ["repaired", "3", "+0.0110", "[+0.0085,", "+0.0135]", "0.0027", "0.0033", "3"]
    assert line.split() == [*numbers, "differs"]
    assert next(p for p in to_bare.splitlines() if p.startswith("random_tables")).endswith(
        "too few seeds"
    )
    assert "repaired" in to_random
    assert "0.5000 +- 0.9937" in shown  # the unpaired spread of bare


def with_ranks(folder: Path, variant: str, seed: int, ranks: list[float], **rules: str) -> str:
    """A file of ranks, as seen from ``folder``."""
    about = {
        "model_sha256": f"{variant}",
        "seed": seed,
        "protocol": {"data": "0", "ties": "mean"} | rules,
    }
    table = pa.table(
        {
            "user": [f"u{n}" for n in range(len(ranks))],
            "target": ["i"] * len(ranks),
            "rank": ranks,
        }
    ).replace_schema_metadata({KEY: json.dumps(about).encode()})
    pq.write_table(table, folder / f"{variant}-{seed}.parquet")
    return f"{variant}-{seed}.parquet"


def test_ranks_of_users_widen_and_narrow_the_intervals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two seeds of equal difference seem certain; their users know better."""
    path, random = tmp_path / "m.parquet", np.random.default_rng(0)
    users = {name: random.integers(1, 30, 60).tolist() for name in ("bare", "repaired")}
    for seed in (0, 1):
        for name, ranks in users.items():
            value = 0.1 + 0.01 * (name == "repaired")
            named = {"ranks": with_ranks(tmp_path, name, seed, ranks)}
            append_row(path, row(name, seed, value) | named)
    assert mltfr(["report", str(path), "--margin", "0.9"]) == 0
    shown = capsys.readouterr().out
    assert "difference to bare, paired by seed, over users and seeds" in shown
    assert "Protocol: data 0; ties mean; checkpoints by" in shown
    line = next(
        block for block in shown.split("over users")[1].splitlines() if "equivalent" in block
    )
    assert line.startswith("repaired      2")
    low, high = (float(block.strip("[],")) for block in line.split()[3:5])
    assert low < 0 < high
    with_ranks(tmp_path, "repaired", 1, users["bare"], ties="optimistic")
    assert mltfr(["report", str(path)]) == 2
    assert "differ in ties (mean there, optimistic here)" in capsys.readouterr().err
    with_ranks(tmp_path, "repaired", 1, users["bare"][:-1])
    assert mltfr(["report", str(path)]) == 2
    assert "hold different users: 1 users only in" in capsys.readouterr().err
    (tmp_path / "repaired-1.parquet").unlink()
    assert mltfr(["report", str(path)]) == 2
    assert "repaired-1.parquet is not there, though the matrix names it" in capsys.readouterr().err


def test_several_matrices_are_taken_together_and_a_run_counts_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = tmp_path / "one.parquet", tmp_path / "other.parquet"
    slices = {
        f"test/{name}/{metric}": value
        for name in ("item_rare", "item_common")
        for metric, value in (("NDCG@10", 0.2), ("users", 7.0))
    }
    for seed in (0, 1):
        append_row(one, row("bare", seed, 0.1) | slices)
        append_row(
            other,
            row("repaired", seed, 0.2) | slices | {"test/item_rare/NDCG@10": 0.3 + 0.2 * seed},
        )
    assert mltfr(["report", str(one), str(other)]) == 0
    shown = capsys.readouterr().out
    assert "differs" in shown
    by_slice = shown.split("by slice")[1].splitlines()
    assert next(line for line in by_slice if line.startswith("(users)")).split() == [
        "(users)",
        "7",
        "7",
    ]
    assert next(line for line in by_slice if line.startswith("repaired")).split() == [
        "repaired",
        "0.4000",
        "0.2000",
    ]
    with pytest.raises(DataError, match="stands in the matrices more than once"):
        summary([one, one])
    assert mltfr(["report", str(one), str(tmp_path)]) == 2


BASELINE = {"backbone": "none", "parameters": 0, "test/item_rare/NDCG@10": 0.25}


def test_baselines_stand_beside_every_backbone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = tmp_path / "one.parquet", tmp_path / "other.parquet"
    append_row(one, row("bare", 0, 0.1))
    append_row(one, row("bare", 0, 0.2) | {"backbone": "fmlp"})
    assert mltfr(["report", str(one)]) == 0
    assert capsys.readouterr().out.count("popularity and item_knn are missing") == 2
    users = {"test/item_rare/users": 7.0}
    for path in (one, other):  # each matrix has them; they count once
        append_row(path, row("popularity", 0, 0.1234) | BASELINE | users)
        append_row(path, row("item_knn", 0, 0.4) | BASELINE | users)
    assert mltfr(["report", str(one), str(other)]) == 0
    shown = capsys.readouterr().out
    assert "missing" not in shown
    for block in shown.split("d, ")[1:]:
        lines = block.splitlines()
        line = next(line for line in lines if line.startswith("popularity"))
        assert line.split() == ["popularity", "-", "0.1234", "0.1234", "0.2468", "0", "1"]
        by_slice = [line.split() for line in block.split("by slice")[1].splitlines()]
        assert ["(users)", "7"] in by_slice
        assert ["item_knn", "0.2500"] in by_slice
        assert ["bare", "-"] in by_slice  # a run whose slices are not known
    append_row(tmp_path / "third.parquet", row("popularity", 0, 0.9) | BASELINE)
    with pytest.raises(DataError, match="d, none, popularity, 0 stands"):
        summary([one, tmp_path / "third.parquet"])


def test_the_documented_results_are_the_stored_ones_beside_their_baselines() -> None:
    text = (REPOSITORY / "docs" / "results.md").read_text()
    result = summary([REPOSITORY / "docs" / "results.parquet"])
    assert "\n".join(line.rstrip() for line in result.splitlines()) in text
    assert "missing" not in result


def test_baselines_are_those_of_a_run(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    inputs = load_inputs(config)
    for name in ("popularity", "item_knn"):
        of_run = compare(name, config, inputs, ALONE, read_test=True)
        result = baseline_result(name, config, inputs.manifest, ALONE, read_test=True)
        assert (of_run.valid, of_run.test) == (result.valid, result.test)
        made = make_row(name, config, result, "commit")
        assert made["test/NDCG@10"] == of_run.test["NDCG@10"]
        thirds = [made[f"test/{third}/users"] for third in ("item_rare", "item_middle")]
        assert sum(thirds) + made["test/item_common/users"] == 120
        assert is_done([made], name, tiny_config(tmp_path, training__seed=7))
        with pytest.raises(ConfigError, match="another configuration"):
            is_done([made], name, tiny_config(tmp_path, evaluation__filter_seen=False))


@pytest.mark.parametrize("content", [None, "text"])
def test_what_is_no_matrix(tmp_path: Path, content: str | None) -> None:
    if content:
        (tmp_path / "m.parquet").write_text(content)
    with pytest.raises(DataError, match=r"m\.parquet"):
        summary([tmp_path / "m.parquet"])


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("bare", {"mltfr.enabled", "training.epochs"}),
        ("bare_equal_parameters", {"mltfr.enabled", "training.epochs", "backbone.hidden_dim"}),
        ("repaired", set()),
        ("random_tables", {"mltfr.table_content"}),
        ("shuffled_tables", {"mltfr.table_content"}),
        ("random_tokens", {"mltfr.filter.strategy"}),
        ("learned_prototypes", {"mltfr.filter.strategy"}),
        ("one_table", {"mltfr.tables"}),
        ("consensus_off", {"mltfr.consensus.enabled", "training.epochs"}),
        ("consensus_zero", {"mltfr.consensus.weight"}),
        (
            "paper",
            {
                "mltfr.filter.noise",
                "mltfr.filter.top_k",
                "mltfr.filter.temperature",
                "mltfr.filter.learn_temperature",
                "mltfr.filter.shortlist_size",
                "mltfr.router.balance_weight",
                "mltfr.consensus.group",
                "mltfr.consensus.fisher_sequences",
                *(f"published.{name}" for name, needs in NEEDS.items() if MLTFR in needs),
            }
            - {"published.double_softmax"},
        ),
        ("without_user_memory", {"published.pooled_memory"}),
        ("without_shared_core", {"published.unaligned_experts", "mltfr.consensus.group"}),
        ("grounded", {"mltfr.item_tokens.source"}),
        ("grounded_random", {"mltfr.item_tokens.source", "mltfr.table_content"}),
    ],
)
def test_an_arm_changes_what_it_says_and_nothing_else(
    tmp_path: Path, name: str, fields: set[str]
) -> None:
    base = tiny_config(tmp_path, backbone__hidden_dim=32, backbone__num_heads=1)
    assert differing(base, name) == fields
    made = quality.variant(name)(base)
    stages = 2 if made.mltfr.enabled and made.mltfr.consensus.enabled else 1
    budget = made.training.epochs + (made.training.consensus_epochs if stages == 2 else 0)
    assert budget == base.training.epochs + base.training.consensus_epochs


def test_the_wide_bare_backbone_has_as_many_parameters(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="No hidden_dim gives the bare backbone"
    ):  # two heads: steps of 2 are too coarse
        quality.variant("bare_equal_parameters")(tiny_config(tmp_path, backbone__hidden_dim=32))
    base = tiny_config(tmp_path, backbone__hidden_dim=32, backbone__num_heads=1)
    wide = quality.variant("bare_equal_parameters")(base)
    assert quality.num_parameters(wide) == pytest.approx(quality.num_parameters(base), rel=0.02)
    more = quality.num_parameters(quality.grounded(base)) - quality.num_parameters(base)
    assert more == 32 * sum(table.rows.shape[1] for table in load_inputs(base).tables)


def test_arms_of_mltfr_are_refused_where_it_is_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each would be the bare backbone under another name."""
    matrix = [str(tmp_path / "m.parquet"), "--preset", "sasrec_beauty", "--seeds", "0"]
    assert quality.main([*matrix, "--variants", "bare", "repaired", "random_tables"]) == 2
    said = capsys.readouterr().err
    assert "repaired, random_tables are forms of MLTFR, and mltfr.enabled is false" in said
    assert not (tmp_path / "m.parquet").exists()


def test_an_unknown_variant_names_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match="no variant `random`") as caught:
        quality.variant("random")
    assert all(name in caught.value.remedy for name in quality.VARIANTS)


def test_the_hash_is_of_the_numbers_and_not_of_the_place(tmp_path: Path) -> None:
    base = tiny_config(tmp_path)
    assert config_sha256(base) == config_sha256(
        tiny_config(tmp_path, name="other", runs_dir="elsewhere")
    )
    assert config_sha256(base) != config_sha256(tiny_config(tmp_path, training__seed=1))


@pytest.mark.integration
def test_a_matrix_is_run_row_by_row_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for (
        name
    ) in SINGLE_PROCESS:  # earlier tests of this process may have left what its own group needed
        monkeypatch.delenv(name, raising=False)
    config = tiny_config(tmp_path, training__epochs=1, training__consensus_epochs=1)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    path = tmp_path / "m.parquet"
    options = [
        str(path),
        "--config",
        str(tmp_path / "c.yaml"),
        "--runs",
        str(tmp_path / "q"),
        "--variants",
        "bare",
        "random_tables",
    ]
    assert quality.main([*options, "--seeds", "0"]) == 0
    first = read_rows(path)
    simple = [("popularity", 0), ("item_knn", 0)]
    assert [(r["variant"], r["seed"]) for r in first] == [
        *simple,
        ("bare", 0),
        ("random_tables", 0),
    ]
    assert quality.main([*options, "--seeds", "0", "1"]) == 0
    rows = read_rows(path)
    assert [(r["variant"], r["seed"]) for r in rows] == [
        *simple,
        ("bare", 0),
        ("random_tables", 0),
        ("bare", 1),
        ("random_tables", 1),
    ]
    assert rows[:4] == first
    assert all((tmp_path / r["ranks"]).exists() for r in rows)
    for r in rows:
        trained = r["backbone"] != "none"
        assert (r["parameters"] > 0) == trained
        assert r["epochs"] == 2 * trained
        assert 0 < r["test/MRR"] < 1
        assert (
            r["test/item_rare/users"] + r["test/item_middle/users"] + r["test/item_common/users"]
            == 120
        )
    assert mltfr(["report", str(path)]) == 0
    capsys.readouterr()
    assert quality.main([*options, "--seeds", "0", "--set", "backbone.dropout=0.3"]) == 2
    assert "made with another configuration" in capsys.readouterr().err
    assert read_rows(path) == rows
