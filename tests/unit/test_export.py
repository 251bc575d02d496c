"""An exported model scores as the run's does, in a process that has neither DeepSpeed nor the run's
inputs.
"""

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
from test_effects import CHANGES, WITH

from mltfr_dist.cli import main as mltfr
from mltfr_dist.config import RunConfig
from mltfr_dist.config.published import MLTFR, without
from mltfr_dist.data.batch import RankingBatch
from mltfr_dist.distributed.meeting import stop_ranks
from mltfr_dist.errors import EXIT_BAD_INPUT, CheckpointError, DamagedError, DataError
from mltfr_dist.exported import load_exported
from mltfr_dist.models.recommender import Recommender
from mltfr_dist.ranking import score_histories
from mltfr_dist.training.build import build_model
from mltfr_dist.training.inputs import Inputs, load_inputs
from mltfr_dist.training.items import load_items
from mltfr_dist.training.running.fit import fit
from mltfr_dist.training.using.export import publish
from mltfr_dist.training.using.inference import LoadedRun, load_run

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
    "titles, part of a group": {
        "mltfr__item_tokens__source": "titles",
        "mltfr__consensus__group": ["second"],
        "mltfr__consensus__weight": 2.0,
        "optimizer__item_gradients": "sparse",
        "loss__name": "sampled_softmax",
        "loss__num_negatives": 8,
    },
    "of padded sequences": {
        "backbone__name": "fmlp_original",
        "data__samples": "prefixes",
        "loss__name": "bce",
    },
    "as published": {
        "published__unaligned_experts": True,
        "mltfr__consensus__group": ["second"],
        "published__random_consensus": True,
        "mltfr__consensus__weight": 2.0,
        "mltfr__filter__noise": 0.5,
        "published__noise_in_evaluation": True,
        "published__trained_tables": True,
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
    result = tmp_path / "scores.safetensors"
    command = [sys.executable, "-c", ELSEWHERE, str(output), json.dumps(HISTORIES), str(result)]
    done = subprocess.run(
        command, env=clean_environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr

    run = load_run(config.folder)
    none = torch.zeros(0, dtype=torch.int64)
    expected = []
    for history in HISTORIES:
        recent = torch.tensor([run.items.encode(history)[-config.data.max_len :]])
        with torch.no_grad():
            expected.append(
                run.model(RankingBatch(recent, torch.zeros(1, dtype=torch.int64), none, none))[0]
            )
    scores = load_file(result)["scores"]
    assert scores.shape == (len(HISTORIES), 41)
    assert torch.equal(scores, torch.stack(expected))
    exported = load_exported(output)
    assert exported.explain(HISTORIES[0]) == run.explain(HISTORIES[0])
    popular = exported.recommend([[]], k=3, empty="popular")
    assert list(popular) == list(run.recommend([[]], k=3, empty="popular"))
    capsys.readouterr()
    assert mltfr(["evaluate", str(config.folder)]) == 0
    reported = json.loads((config.folder / "result.json").read_text())
    assert json.loads(capsys.readouterr().out) == reported["test"]
    if name == "consensus":
        assert mltfr(["export", str(config.folder), str(output)]) == EXIT_BAD_INPUT, (
            "never overwrites"
        )
        assert "exists" in capsys.readouterr().err


ARMS = {
    **{name: WITH.get(name, {}) | {name: value} for name, value in CHANGES.items()},
    **{
        f"mltfr.placement={name}": {"mltfr.placement": name}
        for name in ("rows", "mmap", "replicated", "zero3")
    },
    **{
        f"padded {name}": {
            "backbone.name": f"{name}_original",
            "data.samples": "prefixes",
        }
        for name in ("fmlp", "bsarec", "linrec")
    },
    "two stages of each": {
        "mltfr.expert.per_table": 2,
        "mltfr.consensus.group": ["second"],
        "mltfr.consensus.learn_weight": True,
    },
}
"""Every configuration that test_effects tries, and some more."""


def as_loaded(config: RunConfig, inputs: Inputs, model: Recommender) -> LoadedRun:
    items, cpu = load_items(config), torch.device("cpu")
    return LoadedRun(model, items, config.data.max_len, config, inputs, cpu)


@pytest.mark.parametrize("enabled", [True, False], ids=["mltfr", "bare"])
@pytest.mark.parametrize("arm", ARMS)
def test_every_configuration_scores_the_same_to_the_bit(
    folder: Path, tmp_path: Path, arm: str, enabled: bool
) -> None:
    fields = ARMS[arm] if enabled else ARMS[arm] | without(MLTFR)
    dotted = {key.replace(".", "__"): value for key, value in fields.items()}
    config = tiny_config(folder, **{"mltfr__enabled": enabled} | dotted)
    inputs = load_inputs(config)
    two_stages = config.mltfr.enabled and config.mltfr.consensus.enabled
    model = build_model(config, inputs, with_consensus=two_stages)
    draw = torch.Generator().manual_seed(1)
    state = model.state_dict()  # weights as if trained, the frozen ones and the shortlists' too
    for name, t in state.items():
        if t.is_floating_point():
            state[name] = t + 0.1 * torch.randn(t.shape, generator=draw)
        elif "shortlist" in name:
            state[name] = t + 1
    model.load_state_dict(state)
    for _ in range(5):
        model.after_update(None)
    loaded = as_loaded(config, inputs, model.eval())
    publish(loaded, tmp_path / "model")
    exported = load_exported(tmp_path / "model")
    item_ids = torch.tensor([[1, 2, 3, 4, 5], [7, 0, 0, 0, 0], [40, 39, 40, 0, 0]])
    scores = score_histories(exported.model, item_ids)
    assert scores[:, 1:].isfinite().all()
    assert torch.equal(scores, score_histories(model, item_ids))


def test_folded_tables_are_gone(folder: Path, tmp_path: Path) -> None:
    config = tiny_config(folder, mltfr__filter__shortlist_size=80)
    inputs = load_inputs(config)
    model = build_model(config, inputs, with_consensus=True).eval()
    info = publish(as_loaded(config, inputs, model), tmp_path / "model")
    assert info.folded == {"first": 90}, "the second, of 70 rows, is searched as a whole"
    assert set(load_file(tmp_path / "model" / "tables.safetensors")) == {"second"}
    assert info.folded_bytes == 90 * 12 * 4
    state = load_file(tmp_path / "model" / "model.safetensors")
    assert state["mltfr.selectors.0.projection.values"].shape == (80, 16)
    assert state["mltfr.adapters.0.values"].shape == (80, 4 * 8), "keys and values of two experts"
    assert info.data["source"] == "interactions.txt"
    assert info.licences == {"first": None, "second": None}
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: mltfr_dist\n")
    assert "- first: its source states none" in card
    assert sorted(path.suffix for path in (tmp_path / "model").iterdir()) == [
        *[".json"] * 2,
        ".md",
        ".parquet",
        *[".safetensors"] * 2,
    ]


def test_an_export_that_scores_otherwise_is_not_published(folder: Path, tmp_path: Path) -> None:
    config = tiny_config(folder)
    model = build_model(config, load_inputs(config), with_consensus=True).eval()
    loaded = as_loaded(config, load_inputs(config), model)
    assert loaded.serving is not model, "folded now, and then the model changes"
    model.get_parameter("mltfr.adapters.0.linear.weight").data += 1
    with pytest.raises(CheckpointError, match="scores otherwise"):
        publish(loaded, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_export_is_refused(folder: Path, tmp_path: Path) -> None:
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
