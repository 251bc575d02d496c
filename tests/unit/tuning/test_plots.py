"""A sweep's pictures show what is there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mltfr_dist.schema import validate
from mltfr_dist.tuning import plots
from mltfr_dist.tuning.domain import Domain
from mltfr_dist.tuning.records import Record, Trial
from mltfr_dist.tuning.report import groups
from mltfr_dist.tuning.space import SweepConfig

TRIALS = 198
RED = (214, 39, 40)


def a_sweep(folder: Path) -> SweepConfig:
    values = {
        "name": "synthetic",
        "sweeps_dir": str(folder),
        "preset": "demo",
        "num_trials": TRIALS,
        "search": {
            "optimizer.learning_rate": {"log_uniform": [1e-4, 1e-2]},
            "backbone.num_layers": {"integers": [1, 4]},
            "loss.name": {"choices": ["cross_entropy", "bce"]},
        },
    }
    return validate(SweepConfig, values, source="a test")


def trials_of(sweep: SweepConfig) -> list[tuple[float, Trial]]:
    """Trials, best first, with their outcomes on disk."""
    rng = np.random.default_rng(0)
    result = []
    for number in range(TRIALS):
        values = {
            "optimizer.learning_rate": float(10 ** rng.uniform(-4, -2)),
            "backbone.num_layers": int(rng.integers(1, 5)),
            "loss.name": str(rng.choice(["cross_entropy", "bce"])),
        }
        trial = Trial(sweep.folder, number, Record(values=values))
        trial.folder.mkdir(parents=True)
        value = float(rng.uniform())
        line = f'{{"kind": "valid", "stage": "train", "epoch": 1, "NDCG@10": {value}}}\n'
        (trial.folder / "metrics.jsonl").write_text(line)
        result.append((value, trial))
    return sorted(result, key=lambda pair: -pair[0])


def test_the_best_of_198_lines_is_seen(tmp_path: Path) -> None:
    sweep = a_sweep(tmp_path)
    ranked = trials_of(sweep)
    plots.parallel_coordinates(sweep, ranked, tmp_path / "parallel.png")
    image = np.asarray(Image.open(tmp_path / "parallel.png").convert("RGB"))
    red = (image == RED).all(-1)
    columns = red.any(0)
    left, right = np.flatnonzero(columns)[[0, -1]]
    assert columns[left:right].mean() > 0.9, "it runs over all axes, covered by no other line"
    assert right - left > image.shape[1] / 2


def test_the_effects_of_198_trials_are_drawn(tmp_path: Path) -> None:
    sweep = a_sweep(tmp_path)
    trials = [trial for _, trial in trials_of(sweep)]
    blocks = {key: groups(sweep, key, trials) for key in sweep.search}
    plots.effects(sweep, blocks, 1, tmp_path / "effects.png")
    image = np.asarray(Image.open(tmp_path / "effects.png").convert("RGB"))
    assert (image == RED).all(-1).sum() > 500, "the means are marked"


def test_numbers_lie_where_they_are() -> None:
    trials = [(0, 0.001), (1, 0.003), (2, 0.002)]
    assert plots.positions(Domain(log_uniform=(1e-4, 1e-2)), 0, trials) == [0.001, 0.003, 0.002]
    layers = [(0, 2), (1, 2), (2, 2)]
    assert plots.positions(Domain(integers=(1, 4)), 1, layers) == [1.0] * 3


def test_names_are_spread_with_no_slope() -> None:
    domain = Domain(choices=("a", "b"))
    numbers = np.arange(100)
    positions = np.array(plots.positions(domain, 1, [(int(n), "b") for n in numbers]))
    assert positions.min() > 0.8
    assert positions.max() < 1.2
    assert abs(np.corrcoef(numbers, positions)[0, 1]) < 0.05, "later trials lie no further right"
    assert positions.tolist() == plots.positions(domain, 1, [(int(n), "b") for n in numbers])


@pytest.mark.parametrize("count", [3, 198])
def test_many_lines_are_paler_than_few(count: int) -> None:
    assert plots.others(count)["alpha"] == (0.8 if count == 3 else 0.25)
