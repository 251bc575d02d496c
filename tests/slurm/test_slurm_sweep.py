"""slurm/sweep.sbatch on a real Slurm of two virtual nodes: a Ray cluster in the job, a signal, the
sweep gone on with.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from support import missing_for_slurm, tiny_config
from test_slurm import Slurm, inputs, slurm  # noqa: F401  # fixtures

from mltfr_dist.training.run_folder import dump_config
from mltfr_dist.tuning.records import load_trials, read_validations

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(bool(missing_for_slurm()), reason=missing_for_slurm()),
]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_sweep_on_two_nodes_is_signalled_and_goes_on(
    slurm: Slurm,  # noqa: F811
    inputs: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    base = tiny_config(
        inputs, training__epochs=400, training__patience=400, mltfr__consensus__enabled=False
    )
    (tmp_path / "base.yaml").write_text(dump_config(base))
    space = {
        "name": "swept",
        "sweeps_dir": str(tmp_path),
        "config": str(tmp_path / "base.yaml"),
        # Each trial needs a node of its own; the second is long over when the first has made its
        # epochs.
        "search": {"training.epochs": {"choices": [400, 2]}},
        "algorithm": "grid",
        "scheduler": "none",
        "resources_per_trial": {"workers": 2, "cpus": 1},
        "final_seeds": [],
    }
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    folder = tmp_path / "swept"

    def validations(number: int) -> int:
        return len(read_validations(folder / "trials" / f"{number:04d}" / "metrics.jsonl"))

    options = (
        "--parsable",
        "--partition=low",
        "--nodes=2",
        "--cpus-per-task=2",
        "slurm/sweep.sbatch",
    )
    job = slurm.command("sbatch", *options, str(tmp_path / "space.yaml")).strip()
    slurm.wait("both trials run", lambda: validations(0) > 2 and validations(1) > 1, 400)
    slurm.command("scancel", "--batch", "--signal=USR1", job)  # what `--signal=B:USR1@300` sends
    slurm.wait("it saves and requeues itself", lambda: "requeued" in slurm.log(job))
    trials = load_trials(folder)
    assert trials[0].state == "unfinished"
    before = validations(0)
    slurm.wait("it goes on", lambda: validations(0) > before + 2, 400)
    logs = slurm.submit_folder / "slurm-logs" / job
    assert "2 at a time" in (logs / "start0" / "sweep.log").read_text(), (
        "both nodes' CPUs are one cluster's"
    )
    assert sorted(p.name for p in (logs / "start0").glob("ray-*.log")) == [
        "ray-n1.log",
        "ray-n2.log",
    ]
    assert (logs / "start0" / "token").stat().st_mode & 0o077 == 0
    assert "going on from train-step" in (folder / "trials" / "0000.log").read_text()
    slurm.command("scancel", job)
    slurm.wait(
        "it is gone",
        lambda: slurm.state(job) in ("CANCELLED", "") and not slurm.command("squeue", "--noheader"),
    )
