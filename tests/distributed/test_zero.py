"""Real ranks under real DeepSpeed: the numbers must not depend on how the work is divided."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
from support import REPOSITORY, findings, relative_difference, tiny_config

from mltfr_dist.backbones import BACKBONES
from mltfr_dist.optimizers import OPTIMIZERS

WORKER = Path(__file__).parent / "worker.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("zero")
    tiny_config(place)
    return place


def test_losses_are_the_same_at_any_stage_and_world_size(folder: Path) -> None:
    one, two = findings(WORKER, "losses", folder, 1), findings(WORKER, "losses", folder, 2)
    reference = one["zero0"]
    assert len(reference) == 20
    assert reference[-1] < 0.8 * reference[0], "nothing was learned, so equality would say nothing"
    for name in ("zero0", "zero1", "zero2", "zero3", "accumulated"):
        assert relative_difference(reference, one[name]) < 1e-5, f"{name} on one rank"
        assert relative_difference(reference, two[name]) < 1e-5, f"{name} on two ranks"
    for run in (one, two):
        assert 1e-7 < relative_difference(reference, run["bf16"]) < 0.05, (
            "bf16 is near, and is not fp32"
        )
    for name in ("bce", "bare"):
        assert relative_difference(one[name], two[name]) < 1e-5, name
        assert relative_difference(reference, one[name]) > 1e-4, f"{name} is no variant of its own"


@pytest.mark.integration
def test_every_backbone_and_loss_is_the_same_at_any_division(folder: Path) -> None:
    """Masks, views and shared negatives are drawn alike whatever the ranks and micro-batches."""
    one, two = findings(WORKER, "backbones", folder, 1), findings(WORKER, "backbones", folder, 2)
    names = [name for name, entry in BACKBONES.items() if not entry.reads_future]
    assert len(one) == 2 * len(names)
    for name in names:
        reference = one[f"{name} whole"]
        assert reference[-1] < reference[0], (
            f"{name} has learned nothing, so equality would say little"
        )
        for result in (one, two):
            for kind in ("whole", "accumulated"):
                assert relative_difference(reference, result[f"{name} {kind}"]) < 1e-5, (
                    f"{name} {kind}"
                )


@pytest.mark.integration
@pytest.mark.slow
def test_prefixes_are_the_same_at_any_division(folder: Path) -> None:
    one, two = findings(WORKER, "padded", folder, 1), findings(WORKER, "padded", folder, 2)
    for name in ("fmlp_original", "bsarec_original", "linrec_original", "sasrec", "cl4srec"):
        reference = one[f"{name} whole"]
        assert sum(reference[-3:]) < sum(reference[:3]), f"{name} has learned nothing"
        for result in (one, two):
            for kind in ("whole", "accumulated", "resumed"):
                assert relative_difference(reference, result[f"{name} {kind}"]) < 1e-5, (
                    f"{name} {kind}"
                )


def test_checkpoints_continue_exactly_and_at_other_world_sizes(folder: Path) -> None:
    saved = findings(WORKER, "saved", folder, 2)
    for stage in range(4):
        assert saved[f"zero{stage} resumed"] == saved[f"zero{stage} uninterrupted"], (
            f"stage {stage}"
        )
    for num_ranks in (1, 4):
        elsewhere = findings(WORKER, "elsewhere", folder, num_ranks)
        for name, losses in elsewhere.items():
            uninterrupted = saved[name.replace("resumed", "uninterrupted")]
            assert relative_difference(uninterrupted, losses) < 1e-5, f"{name} on {num_ranks} ranks"


def test_fisher_is_the_same_at_any_batch_size_world_size_and_stage(folder: Path) -> None:
    one, two = findings(WORKER, "fisher", folder, 1), findings(WORKER, "fisher", folder, 2)
    reference = one["batch 8"]
    largest = max(reference)
    assert largest > 0
    for name in ("batch 8", "batch 32", "zero1", "zero3"):
        for result in (one, two):
            assert (
                max(abs(a - b) for a, b in zip(reference, result[name], strict=True))
                < 1e-5 * largest
            ), name
    # The published estimate is that of the global batch, however it is divided.
    published = [
        result[name] for result in (one, two) for name in result if name.startswith("batch mean")
    ]
    assert len(published) == 4
    for result in published:
        assert max(abs(a - b) for a, b in zip(published[0], result, strict=True)) < 1e-5 * max(
            published[0]
        )
    assert max(published[0]) < 0.9 * largest
    # Forming it must leave nothing behind in DeepSpeed's gradient buckets.
    assert relative_difference(one["zero1 still trains"], two["zero3 still trains"]) < 1e-5


@pytest.mark.integration
def test_every_deepspeed_file_trains_alike_and_offloaded_states_resume(folder: Path) -> None:
    result = findings(WORKER, "offloaded", folder, 2)
    reference = result["zero0 fp32"]
    names = {path.stem for path in (REPOSITORY / "ds_configs").glob("*.json")}
    assert names == {"zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"}
    for name in names:
        assert relative_difference(reference, result[f"{name} fp32"]) < 1e-5, name
        if name != "zero0":
            assert 1e-7 < relative_difference(reference, result[f"{name} bf16"]) < 0.05, name
        if "offload" in name:
            assert (
                relative_difference(result[f"{name} uninterrupted"], result[f"{name} resumed"])
                < 1e-6
            ), name


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_optimizer_trains_alike_under_deepspeed_and_resumes(folder: Path) -> None:
    one, two = findings(WORKER, "optimizers", folder, 1), findings(WORKER, "optimizers", folder, 2)
    files = ("zero0", "zero1", "zero2_offload", "zero3")
    references = {name: one[f"{name} zero0 uninterrupted"] for name in OPTIMIZERS}
    for name, reference in references.items():
        assert reference[-1] < reference[0], f"{name} has learned nothing"
        for result in (one, two):
            for file in files:
                losses = result[f"{name} {file} uninterrupted"]
                assert relative_difference(reference, losses) < 1e-5, f"{name} {file}"
                resumed = result[f"{name} {file} resumed"]
                assert relative_difference(losses, resumed) < 1e-6, f"{name} {file} resumed"
    for name, other in combinations(references, 2):
        assert relative_difference(references[name], references[other]) > 1e-4, f"{name} {other}"


def test_each_deepspeed_file_is_documented() -> None:
    text = (REPOSITORY / "ds_configs" / "README.md").read_text()
    for path in (REPOSITORY / "ds_configs").glob("*.json"):
        assert f"`{path.name}`" in text
