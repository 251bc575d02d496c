"""The table of repairs: defaults are repaired, each can be taken away alone, and the published form
runs in two stages.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import REPOSITORY, tiny_config

from mltfr_dist.config import PublishedConfig, RunConfig
from mltfr_dist.config.published import NEEDS
from mltfr_dist.distributed import checkpoint
from mltfr_dist.distributed.meeting import stop_ranks
from mltfr_dist.errors import ConfigError
from mltfr_dist.presets import preset
from mltfr_dist.repairs import (
    ALSO_PUBLISHED,
    REPAIRS,
    applies,
    as_published,
    taken_away,
    without,
)
from mltfr_dist.resolve import merge_values
from mltfr_dist.schema import changed, field_paths, validate, value_at
from mltfr_dist.training.build import build_model
from mltfr_dist.training.inputs import load_inputs
from mltfr_dist.training.running.fit import fit
from mltfr_dist.training.running.stages import CORE, FISHER

DEFECTS = [
    "D1",
    "D2",
    "D3",
    "D4",
    "D5",
    "D6",
    "D7",
    "D8",
    "D9",
    "D10",
    "D10b",
    "D12",
    "D13",
    "D14",
    "D17",
    "D18",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("repairs")
    stop_ranks()


def test_every_defect_has_its_entry_and_its_line_in_the_documentation() -> None:
    assert [repair.defect for repair in REPAIRS.values()] == DEFECTS
    text = (REPOSITORY / "docs" / "method.md").read_text()
    for name, repair in REPAIRS.items():
        (line,) = [row for row in text.splitlines() if row.startswith(f"| {repair.defect} |")]
        assert f"`{name}`" in line
        fields = {*repair.values, *(f"published.{switch}" for switch in repair.switches)}
        assert all(path.rpartition(".")[2] in line for path in fields), line
        assert fields <= set(field_paths(RunConfig))


def test_the_defaults_are_repaired(folder: Path) -> None:
    config = tiny_config(folder)
    assert taken_away(config) == []
    assert config.published.on() == []
    for name, repair in REPAIRS.items():
        if not applies(config, name):
            with pytest.raises(ConfigError, match=rf"published\.{repair.switches[0]}=true needs"):
                without(config, name)
            continue
        lacking = without(config, name)
        assert lacking.published.on() == list(repair.switches)
        assert all(value_at(lacking, path) == wanted for path, wanted in repair.values.items())
        assert taken_away(lacking) == [name]


def test_every_switch_belongs_to_a_repair_or_to_what_else_was_set() -> None:
    of_repairs = [switch for repair in REPAIRS.values() for switch in repair.switches]
    others = [path for fields in ALSO_PUBLISHED.values() for path in fields]
    others = [path.partition(".")[2] for path in others if path.startswith("published.")]
    assert sorted(of_repairs + others) == sorted(PublishedConfig.model_fields) == sorted(NEEDS)


BERT4REC = {"backbone": {"name": "bert4rec"}}
REFUSED = [
    ("straight_through", {"mltfr": {"filter": {"strategy": "direct"}}}, "strategy=user_guided"),
    ("noise_in_evaluation", {}, "mltfr.filter.noise above 0"),
    ("pooled_memory", {"mltfr": {"filter": {"strategy": "direct"}}}, "or random_tokens"),
    ("whole_history_query", {"mltfr": {"enabled": False}}, "mltfr.enabled=true"),
    ("whole_sequence_filter", BERT4REC, "backbone.name=fmlp or bsarec"),
    ("trained_tables", {"mltfr": {"enabled": False}}, "mltfr.enabled=true"),
    ("read_before_mask", {}, "backbone.name=bert4rec"),
    ("attending_padding", {}, "backbone.name=bert4rec"),
    ("double_softmax", {"mltfr": {"router": {"expert_dropout": 0.1}}}, "a dense gate"),
    ("random_consensus", {"mltfr": {"consensus": {"enabled": False}}}, "consensus.enabled=true"),
    ("fresh_start", {"mltfr": {"consensus": {"enabled": False}}}, "consensus.enabled=true"),
    ("batch_mean_fisher", {"mltfr": {"consensus": {"enabled": False}}}, "consensus.enabled=true"),
    ("unnormalised_fisher", {"mltfr": {"enabled": False}}, "mltfr.enabled=true"),
    ("unaligned_experts", {"mltfr": {"enabled": False}}, "mltfr.enabled=true"),
    (
        "consensus_without_dropout",
        {"mltfr": {"consensus": {"enabled": False}}},
        "consensus.enabled=true",
    ),
    ("fisher_at_last_epoch", {"mltfr": {"enabled": False}}, "mltfr.enabled=true"),
    ("train_on_validation", {}, "published.pick_on_test=true"),
    ("negatives_outside_inputs", {}, "loss.name=bce or gbce"),
]


@pytest.mark.parametrize(("defect", "given", "needed"), REFUSED, ids=[r[0] for r in REFUSED])
def test_a_defect_of_what_the_run_has_not_is_refused(
    folder: Path, defect: str, given: dict[str, Any], needed: str
) -> None:
    plain = merge_values(tiny_config(folder).model_dump(mode="json"), given)
    validate(RunConfig, plain, source="a test")
    with pytest.raises(ConfigError) as caught:
        validate(RunConfig, merge_values(plain, {"published": {defect: True}}), source="a test")
    assert f"published.{defect}=true needs " in caught.value.what
    assert needed in caught.value.what
    assert f"give that too, or leave published.{defect} out" in caught.value.what


def test_every_need_is_refused() -> None:
    assert {defect for defect, _, _ in REFUSED} == {name for name, needs in NEEDS.items() if needs}


PLAIN = {"mltfr.filter.top_k": 16} | {f"published.{name}": False for name in NEEDS}
"""What makes a run of preset `paper` one without switches."""
NOT_OF_SASREC = {"causal_filter", "read_the_mask", "masked_padding"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, set(REPAIRS) - NOT_OF_SASREC - {"single_softmax"}),
        ({"backbone.name": "bert4rec"}, set(REPAIRS) - {"causal_filter", "single_softmax"}),
        (
            {"backbone.name": "bsarec", "loss.name": "cross_entropy"},
            set(REPAIRS)
            - {"read_the_mask", "masked_padding", "single_softmax", "unseen_negatives"},
        ),
        ({"mltfr.enabled": False}, {"validation_picks", "unseen_negatives"}),
        (
            {"mltfr.consensus.enabled": False},
            set(REPAIRS)
            - NOT_OF_SASREC
            - {"single_softmax", "going_on", "per_sample_fisher", "normalised_fisher"},
        ),
        (
            {"mltfr.filter.strategy": "learned_prototypes"},
            {
                "frozen_tables",
                "going_on",
                "per_sample_fisher",
                "normalised_fisher",
                "shared_core",
                "validation_picks",
                "unseen_negatives",
            },
        ),
    ],
)
def test_a_run_is_said_to_lack_only_what_it_could_have(
    changes: dict[str, Any], named: set[str]
) -> None:
    base = changed(preset("paper"), PLAIN | changes, source="a test")
    assert set(taken_away(as_published(base))) == named


def test_an_unknown_repair_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="nearest is `user_memory`"):
        without(RunConfig(data={"path": "x"}, mltfr={"enabled": False}), "user_memry")


def published(folder: Path, **changes: Any) -> RunConfig:
    """As published, with its loss; the tiny tables differ in width, so that the group is one of
    them.
    """
    fields = {
        "mltfr__consensus__group": ["first"],
        "mltfr__consensus__weight": 0.01,
        "loss__name": "bce",
    }
    return as_published(
        tiny_config(folder, training__epochs=2, training__consensus_epochs=1, **fields | changes)
    )


def test_the_published_form_trains_in_two_stages(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = published(
        folder, name="published", checkpoint__keep_last=20, checkpoint__every_steps=1
    )
    assert set(REPAIRS) - set(taken_away(config)) == NOT_OF_SASREC | {"single_softmax"}
    (result,) = fit(config)
    assert "repairs taken away: soft_weights" in capsys.readouterr().out
    checkpoints = config.folder / "checkpoints"
    inputs = load_inputs(config)
    # Stage 1 adds a frozen, randomly initialised consensus expert, which no step moves.
    start = build_model(config, inputs, with_consensus=False).state_dict()
    first = checkpoint.read(checkpoints / "train-step000000001")
    last = checkpoint.read(max(checkpoints.glob("train-step*")))
    assert torch.equal(start["mltfr.consensus.value.weight"], last["mltfr.consensus.value.weight"])
    assert start["mltfr.consensus.value.weight"].abs().max() > 0
    # Tables called frozen drift.
    assert not torch.equal(first["mltfr.tables.0.rows"], last["mltfr.tables.0.rows"])
    # Stage 2 starts from a fresh initialisation: only the consensus expert carries over.
    second = checkpoint.read(checkpoints / "consensus-step000000001")
    merged, fisher = (checkpoint.read(checkpoints / "fisher", kind) for kind in (CORE, FISHER))
    for name, tensor in merged.items():
        assert torch.equal(second[f"mltfr.consensus.{name}"], tensor)
    # A group of one merges to F theta / (F + 1e-12).
    end = checkpoint.read(
        checkpoint.step_folder(checkpoints, checkpoint.read_header(checkpoints / "fisher").progress)
    )
    weight, core = fisher["0.value.weight"].double(), end["mltfr.cores.0.value.weight"].double()
    torch.testing.assert_close(merged["value.weight"], (weight * core / (weight + 1e-12)).float())
    moved = (
        (second["backbone.item_embedding.weight"] - start["backbone.item_embedding.weight"])
        .abs()
        .max()
    )
    assert (
        moved
        < 2 * config.optimizer.learning_rate
        < (last["backbone.item_embedding.weight"] - start["backbone.item_embedding.weight"])
        .abs()
        .max()
    )
    assert "picked on the test split" in (config.folder / "report.md").read_text()
    assert json.loads((config.folder / "result.json").read_text())["name"] == result.name


def test_double_softmax_is_reported(folder: Path) -> None:
    config = tiny_config(
        folder,
        name="doubled",
        published__double_softmax=True,
        training__epochs=1,
        training__consensus_epochs=1,
    )
    (result,) = fit(config)
    assert result.routing["largest_weight"] < 0.74  # e / (e + 1), for two experts
    text = (config.folder / "report.md").read_text()
    assert "## Routing" in text
    assert f"{result.routing['entropy']:.2f} of at most 0.69 nats" in text
    assert "single_softmax (D10)" in text
