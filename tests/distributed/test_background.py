"""Checkpoints that are written while training goes on are those of a run that waits, to the byte,
and are complete or absent.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from background_worker import VARIANTS
from support import clean_environment, findings, read_lines, tiny_config, torchrun

from mltfr_dist.distributed import kept
from mltfr_dist.distributed.checkpoint import HEADER, PARTIAL, read_header
from mltfr_dist.distributed.meeting import stop_ranks
from mltfr_dist.distributed.signals import forget_request, pause_after
from mltfr_dist.errors import StoppedError
from mltfr_dist.training.run_folder import load_result
from mltfr_dist.training.running.fit import fit

WORKER = Path(__file__).parent / "background_worker.py"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != HEADER}


def test_what_is_written_meanwhile_is_what_was_there_at_its_step(tmp_path: Path) -> None:
    tiny_config(tmp_path)
    result = findings(WORKER, "written", tmp_path, 2)
    for name in VARIANTS:
        waited, meanwhile = (tmp_path / f"{name} {kind}" for kind in ("waited", "meanwhile"))
        assert contents(waited) == contents(meanwhile)
        assert len(contents(meanwhile)) == (6 if "rows" in name else 2)
        assert read_header(waited) == read_header(meanwhile)
        best = contents(tmp_path / f"{name} best")
        assert best == {
            file: content for file, content in contents(waited).items() if "model" in file
        }
        assert result[f"{name} from meanwhile"] == result[f"{name} meanwhile"], "to the digit"
        assert result[f"{name} from waited"] == result[f"{name} meanwhile"]


def test_a_kill_amid_a_write_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    tiny_config(tmp_path)
    done = subprocess.run(
        torchrun(2, WORKER, "killed", str(tmp_path), str(tmp_path / "none")),
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr
    said: list[str] = []
    place = tmp_path / "killed"
    (half,) = place.glob(f"{PARTIAL}*")
    assert {path.name for path in half.iterdir()} >= {"model.safetensors", "optimizer.safetensors"}
    assert kept.latest_intact(place, "train", said.append) == place / "train-step000000003"
    kept.remove_interrupted(place, said.append)
    assert ["the save of train-step000000005 was interrupted" in line for line in said] == [True]
    result = findings(WORKER, "after", tmp_path, 2)
    assert result["resumed"] == result["whole"]


def test_a_run_leaves_the_same_with_either_way_and_paused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both stages, with checkpoints within epochs; then a run that pauses after every epoch."""
    changes = {
        "training__epochs": 2,
        "training__consensus_epochs": 1,
        "checkpoint__every_steps": 2,
        "checkpoint__keep_best": 2,
    }
    waits = tiny_config(tmp_path, **changes)
    meanwhile = tiny_config(tmp_path, name="meanwhile", checkpoint__background=True, **changes)
    paused = tiny_config(tmp_path, name="paused", checkpoint__background=True, **changes)
    fit(waits)
    fit(meanwhile)
    for epochs in (1, 2):
        pause_after(epochs)
        with pytest.raises(StoppedError):
            fit(paused)
        assert not list((paused.folder / "checkpoints").glob(f"{PARTIAL}*"))
    forget_request()
    fit(paused)
    stop_ranks()
    assert "given up" not in capsys.readouterr().out
    expected = sorted(path.name for path in (waits.folder / "checkpoints").iterdir())
    assert len(expected) > 5
    for other in (meanwhile, paused):
        assert sorted(path.name for path in (other.folder / "checkpoints").iterdir()) == expected
        for name in expected:
            first, second = (c.folder / "checkpoints" / name for c in (waits, other))
            assert read_header(first).sha256 == read_header(second).sha256
        assert [line | {"seconds": 0} for line in read_lines(other.folder / "metrics.jsonl")] == [
            line | {"seconds": 0} for line in read_lines(waits.folder / "metrics.jsonl")
        ]
        one, two = load_result(waits.folder), load_result(other.folder)
        assert one is not None
        assert two is not None
        assert one.test == two.test
