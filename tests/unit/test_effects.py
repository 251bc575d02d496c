"""Every field of a run's configuration has an effect: a run with it changed leaves another
trace.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import REPOSITORY, read_lines, tiny_config

from mltfr_dist.config import RunConfig
from mltfr_dist.config.published import NEEDS
from mltfr_dist.distributed.meeting import stop_ranks
from mltfr_dist.schema import Section, field_paths
from mltfr_dist.training.running.fit import fit

CHANGES: dict[str, Any] = {
    "data.max_len": 5,
    "data.shuffle_shards": 1,
    "data.long_histories": "windows",
    "data.samples": "prefixes",
    "data.length_pool": 2,
    "data.last_batch": "drop",
    "data.left_out": ["train-000001.tar"],
    "backbone.hidden_dim": 8,
    "backbone.num_layers": 1,
    "backbone.num_heads": 4,
    "backbone.dropout": 0.6,
    "backbone.name": "linrec",
    "backbone.bert4rec.mask_ratio": 0.9,
    "backbone.bsarec.low_frequencies": 2,
    "backbone.bsarec.inductive_bias": 0.1,
    "backbone.cl4srec.crop_ratio": 0.3,
    "backbone.cl4srec.mask_ratio": 0.9,
    "backbone.cl4srec.reorder_ratio": 0.9,
    "backbone.cl4srec.contrast_weight": 2.0,
    "backbone.cl4srec.contrast_temperature": 0.3,
    "backbone.cl4srec.contrast_group": 8,
    "mltfr.enabled": False,
    "mltfr.table_content": "random",
    "mltfr.filter.strategy": "random_tokens",
    "mltfr.filter.noise": 0.5,
    "mltfr.filter.noise_steps": 2,
    "mltfr.filter.num_prototypes": 5,
    "mltfr.filter.seed_words": ["first-7", "second-7"],
    "mltfr.filter.seed_neighbours": 3,
    "mltfr.filter.top_k": 3,
    "mltfr.filter.filter_ratio": 0.1,
    "mltfr.filter.temperature": 0.5,
    "mltfr.filter.learn_temperature": False,
    "mltfr.filter.query_every": 1,
    "mltfr.filter.shortlist_size": 5,
    "mltfr.filter.shortlist_refresh_steps": 1,
    "mltfr.expert.per_table": 2,
    "mltfr.item_tokens.source": "titles",
    "mltfr.expert.num_heads": 4,
    "mltfr.expert.head_dim": 8,
    "mltfr.expert.dropout": 0.7,
    "mltfr.router.balance_weight": 3.0,
    "mltfr.router.name": "sigmoid",
    "mltfr.router.top_k": 2,
    "mltfr.router.null_expert": True,
    "mltfr.router.expert_dropout": 0.4,
    "mltfr.consensus.enabled": False,
    "mltfr.consensus.group": ["second"],
    "mltfr.consensus.learn_weight": True,
    "mltfr.consensus.weight": 2.0,
    "mltfr.consensus.fisher_sequences": 3,
    "loss.name": "bce",
    "loss.num_negatives": 4,
    "loss.proposal": "log_uniform",
    "loss.calibration": 0.1,
    "optimizer.learning_rate": 0.01,
    "optimizer.name": "adam",
    "optimizer.betas": [0.5, 0.9],
    "optimizer.momentum": 0.5,
    "optimizer.weight_decay": 0.5,
    "optimizer.warmup_steps": 3,
    "optimizer.schedule": "cosine",
    "optimizer.max_grad_norm": 0.01,
    "optimizer.item_gradients": "sparse",
    "training.seed": 1,
    "training.global_batch_size": 40,
    "training.precision": "bf16",
    "training.epochs": 3,
    "training.consensus_epochs": 2,
    "training.patience": 1,
    "training.log_every_steps": 3,
    "evaluation.cutoffs": [10],
    "evaluation.filter_seen": False,
    "evaluation.every_epochs": 2,
    "checkpoint.every_steps": 3,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_best": 2,
    "deepspeed": str(REPOSITORY / "ds_configs" / "zero3.json"),
    "baselines": ["popularity"],
    **{f"published.{name}": True for name in NEEDS},
}
"""What each field is changed to."""

SEED_WORDS = {
    "mltfr.filter.strategy": "seed_words",
    "mltfr.filter.seed_words": ["first-3", "second-3"],
}

WITH: dict[str, dict[str, Any]] = {
    "mltfr.filter.filter_ratio": {"mltfr.filter.top_k": None, "mltfr.filter.filter_ratio": 0.2},
    "mltfr.filter.num_prototypes": {"mltfr.filter.strategy": "learned_prototypes"},
    "mltfr.filter.seed_words": SEED_WORDS,
    "mltfr.filter.seed_neighbours": SEED_WORDS,
    "mltfr.filter.noise_steps": {"mltfr.filter.noise": 0.5},
    "mltfr.router.top_k": {"mltfr.expert.per_table": 2},
    **{
        path: {"backbone.name": path.split(".")[1]}
        for path in CHANGES
        if path.startswith(("backbone.bert4rec", "backbone.bsarec", "backbone.cl4srec"))
    },
    "published.noise_in_evaluation": {"mltfr.filter.noise": 0.5},
    "published.whole_sequence_filter": {"backbone.name": "bsarec"},
    "published.read_before_mask": {"backbone.name": "bert4rec"},
    "published.attending_padding": {"backbone.name": "bert4rec"},
    "published.unaligned_experts": {"mltfr.consensus.group": ["first"]},
    "published.fisher_at_last_epoch": {"optimizer.learning_rate": 0.3, "training.epochs": 3},
    "published.train_on_validation": {"published.pick_on_test": True},
    "published.negatives_outside_inputs": {"loss.name": "bce"},
    "data.long_histories": {"data.max_len": 5},
    "loss.num_negatives": {"loss.name": "bce"},
    "loss.proposal": {"loss.name": "sampled_softmax", "loss.num_negatives": 8},
    "loss.calibration": {"loss.name": "gbce", "loss.num_negatives": 2},
    "optimizer.item_gradients": {"loss.name": "sampled_softmax", "loss.num_negatives": 8},
    "optimizer.name": {"optimizer.weight_decay": 0.5},
    "optimizer.momentum": {"optimizer.name": "sgd"},
    "training.patience": {"training.epochs": 6, "optimizer.learning_rate": 1e-9},
    "checkpoint.keep_last": {"checkpoint.every_steps": 3},
}
"""What else must hold, in both runs, for a field to matter."""

ELSEWHERE = {
    "name": "names the folder: test_run_folder",
    "runs_dir": "names the folder: test_run_folder",
    "data.path": "every test that trains",
    "data.on_bad_shard": "needs a bad shard: test_damage",
    "data.read_attempts": "needs a failing disk: test_damage",
    "data.read_timeout": "needs a slow disk: test_damage",
    "data.num_workers": "must not change the batches: test_stream",
    "mltfr.tables": "every test that trains",
    "mltfr.placement": "must not change the numbers: tests/distributed/test_placement.py",
    "item_table.placement": "must not change the numbers: tests/distributed/test_divided_items.py",
    "mltfr.filter.max_direct_rows": "larger memories are refused: models/test_strategies",
    "training.micro_batch_size": "must *not* change the numbers: tests/distributed/test_zero.py",
    "tracking.also": "needs another package: test_board",
    "tracking.projector_items": "must not change the numbers: test_board",
    "training.max_skipped_steps": "needs numbers that are not finite: distributed/test_health",
    "training.hang_seconds": "needs a hang: distributed/test_health",
    "training.threads": "must not change the numbers: test_threads below",
    "evaluation.select_by": "picks: test_picked",
    "evaluation.batch_size": "must not change the numbers: test_evaluate",
    "evaluation.ties": "needs equal scores: test_evaluate, test_metrics",
}
"""Fields whose effect another test shows."""


def leaves() -> set[str]:
    paths = field_paths(RunConfig)
    return {p for p in paths if not any(other.startswith(p + ".") for other in paths)}


def test_every_field_is_tried() -> None:
    assert issubclass(RunConfig, Section)
    assert set(CHANGES) | set(ELSEWHERE) == leaves()
    assert not set(CHANGES) & set(ELSEWHERE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    place = tmp_path_factory.mktemp("effects")
    yield place
    stop_ranks()


def trace(folder: Path, name: str, changes: dict[str, Any]) -> tuple[list[Any], list[str], str]:
    """What a run leaves: its metrics, its files, its report's rows."""
    dotted = {key.replace(".", "__"): value for key, value in changes.items()}
    start = {"training__epochs": 2, "training__consensus_epochs": 1, "name": name}
    config = tiny_config(folder, **(start | dotted))
    if not config.folder.exists():
        fit(config)
    files = sorted(
        str(p.relative_to(config.folder)) for p in (config.folder / "checkpoints").rglob("*")
    )
    rows = [
        line
        for line in (config.folder / "report.md").read_text().splitlines()
        if line.startswith("| ") and " s |" in line
    ]
    return (
        read_lines(config.folder / "metrics.jsonl"),
        files,
        str([row.split("|")[1] for row in rows]),
    )


@pytest.mark.parametrize("field", CHANGES)
def test_field_has_an_effect(folder: Path, field: str) -> None:
    needed = WITH.get(field, {})
    base_name = "base" + "".join(f"-{k}-{v}" for k, v in needed.items()).translate(
        str.maketrans(".[]' ,", "------")
    )
    assert trace(folder, base_name, needed) != trace(
        folder, field.replace(".", "-"), needed | {field: CHANGES[field]}
    )


@pytest.mark.integration
@pytest.mark.parametrize("name", ["fmlp", "bsarec", "linrec"])
def test_the_padded_form_has_an_effect(folder: Path, name: str) -> None:
    base = {"backbone.name": name, "data.samples": "prefixes", "mltfr.enabled": False}
    padded = base | {"backbone.name": f"{name}_original"}
    assert trace(folder, f"prefixes-{name}", base) != trace(folder, f"padded-{name}", padded)


def test_the_same_run_leaves_the_same_trace(folder: Path) -> None:
    assert trace(folder, "base", {}) == trace(folder, "again", {})


def test_threads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from mltfr_dist.distributed.meeting import start_ranks

    before = torch.get_num_threads()
    start_ranks(2)
    assert torch.get_num_threads() == 2
    start_ranks(1)
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)
