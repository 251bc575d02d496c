"""An exported model scores as the run's does, in a process that has neither DeepSpeed nor the run's inputs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import clean_environment, tiny_config

from mltfr_dist.cli import main as mltfr
from mltfr_dist.data.batch import RankingBatch
from mltfr_dist.distributed.ranks import stop_ranks
from mltfr_dist.errors import EXIT_BAD_INPUT
from mltfr_dist.training.fit import fit
from mltfr_dist.training.inference import encode_history, load_run

HISTORIES = [["i1", "i2", "i3"], ["i9"], [f"i{n}" for n in range(15)]]
"""Of other lengths; the last is longer than the model reads."""

ELSEWHERE = """
import importlib.abc, json, sys
from pathlib import Path

class Refused(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "deepspeed" or name.startswith("mltfr_dist.distributed"):
            raise ImportError(f"{name} is refused here")

sys.meta_path.insert(0, Refused())
import torch
from safetensors.torch import save_file
from mltfr_dist.exported import load_exported

exported = load_exported(Path(sys.argv[1]))
histories = json.loads(sys.argv[2])
alone = torch.cat([exported.scores([history]) for history in histories])
torch.testing.assert_close(exported.scores(histories), alone, rtol=1e-5, atol=1e-6)
save_file({"scores": alone}, sys.argv[3])
assert "deepspeed" not in sys.modules
try:
    import deepspeed
except ImportError:
    sys.exit(0)
sys.exit("deepspeed could be imported, so the test says nothing")
"""

RUNS = {
    "consensus": {},
    "bare": {"mltfr__enabled": False},
    "cloze, seed words": {
        "backbone__name": "bert4rec",
        "mltfr__filter__strategy": "seed_words",
        "mltfr__filter__seed_words": ["first-3", "second-3"],
        "mltfr__table_content": "shuffled",
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tmp_path_factory.mktemp("export")
    stop_ranks()


@pytest.mark.parametrize("name", RUNS)
def test_scores_are_the_same(
    folder: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(
        folder,
        name=name.replace(", ", "-").replace(" ", "-"),
        training__epochs=1,
        training__consensus_epochs=1,
        **RUNS[name],
    )
    fit(config)
    output = tmp_path / "model"
    assert mltfr(["export", str(config.folder), str(output)]) == 0
    found = tmp_path / "scores.safetensors"
    command = [sys.executable, "-c", ELSEWHERE, str(output), json.dumps(HISTORIES), str(found)]
    done = subprocess.run(
        command, env=clean_environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr

    run = load_run(config.folder)
    none = torch.zeros(0, dtype=torch.int64)
    expected = []
    for history in HISTORIES:
        recent = torch.tensor([encode_history(run, history)[-config.data.max_len :]])
        with torch.no_grad():
            expected.append(
                run.model(RankingBatch(recent, torch.zeros(1, dtype=torch.int64), none, none))[0]
            )
    scores = load_file(found)["scores"]
    assert scores.shape == (len(HISTORIES), 41)
    assert torch.equal(scores, torch.stack(expected))
    if name == "consensus":
        capsys.readouterr()
        assert mltfr(["export", str(config.folder), str(output)]) == EXIT_BAD_INPUT, (
            "never overwrites"
        )
        assert "exists" in capsys.readouterr().err


def test_a_damaged_export_is_refused(folder: Path, tmp_path: Path) -> None:
    from mltfr_dist.errors import DamagedError, DataError
    from mltfr_dist.exported import load_exported

    config = tiny_config(
        folder, name="bare", training__epochs=1, training__consensus_epochs=1, mltfr__enabled=False
    )
    fit(config)
    output = tmp_path / "model"
    assert mltfr(["export", str(config.folder), str(output)]) == 0
    with pytest.raises(DataError, match="i999"):
        load_exported(output).scores([["i1", "i999"]])
    content = bytearray((output / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (output / "model.safetensors").write_bytes(bytes(content))
    with pytest.raises(DamagedError, match=r"model\.safetensors"):
        load_exported(output)
